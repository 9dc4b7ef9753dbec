"use strict";
// Clips play on click, one at a time.
const clips = [...document.querySelectorAll(".clip")];
const screens = [...document.querySelectorAll(".screen")];
for (const screen of screens) {
  const video = screen.querySelector("video");
  const button = screen.querySelector(".play");
  screen.addEventListener("click", () => {
    if (!video.paused) return video.pause();
    for (const other of screens) other.querySelector("video").pause();
    video.play();
  });
  for (const name of ["play", "pause", "ended"]) {
    video.addEventListener(name, () => {
      screen.classList.toggle("playing", !video.paused);
      const verb = video.paused ? "Play" : "Pause";
      button.setAttribute("aria-label", button.getAttribute("aria-label").replace(/^\w+/, verb));
    });
  }
  video.addEventListener("timeupdate", () => {
    const share = video.duration ? video.currentTime / video.duration : 0;
    screen.querySelector(".time").style.width = `${100 * share}%`;
  });
}
// The buttons above the gallery show one kind of clip.
const buttons = [...document.querySelectorAll(".filters button")];
for (const button of buttons) {
  button.addEventListener("click", () => {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    const want = button.dataset.show;
    for (const clip of clips) {
      clip.hidden = want !== "all" && !clip.dataset.kinds.split(" ").includes(want);
    }
  });
}
