"use strict";
// A click on a column's title sorts its table; rows without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.querySelector("tbody");
  heads.forEach((head, place) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const first = head.dataset.first;
      const other = first === "ascending" ? "descending" : "ascending";
      const order = before === first ? other : first;
      for (const one of heads) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = row => row.children[place].dataset.value;
      const text = head.dataset.kind === "text";
      const rows = [...body.rows];
      rows.sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (text ? x.localeCompare(y) : Number(x) - Number(y));
      });
      body.append(...rows);
    });
  });
}
