"""A feature store at a URL (S3, GCS, HTTP: whatever fsspec knows), which is read and not written.

It is a copy of a store's folder. A local folder, itself a feature store, keeps the shards that were
needed so far, within ``store.budget_gb``; all processes of a machine share it. The index is read
from the headers of the shards, in two small requests each. A shard is fetched whole when one of its
features is first read, and every byte is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from mmemo.errors import StoreError
from mmemo.features import shard
from mmemo.features.shard import DamagedShard, FeaturePlace
from mmemo.features.store import FeatureStore
from mmemo.media.config import StoreConfig

if TYPE_CHECKING:  # this import loads transformers
    from mmemo.models.backbone import Features


class ObjectStore(FeatureStore):
    """A store at ``url``, with its local copy in the folder ``config.path``.

    Raises:
        StoreError: the URL cannot be read, has no feature store, or a shard there is damaged; or
            something was to be written.
    """

    def __init__(self, config: StoreConfig, url: str) -> None:
        self.url = url.rstrip("/")
        self._sizes: dict[str, int] = {}  # of the shards at the URL, in bytes
        with self._reading():
            fs, root = fsspec.url_to_fs(self.url)
            self._fs: Any = fs
            self._root = str(root).rstrip("/")
            self._list()
        super().__init__(config.model_copy(update={"crops_gb": 0.0}))
        self._take_outcomes()

    def _list(self) -> None:
        entries: list[dict[str, Any]] = self._fs.ls(f"{self._root}/shards", detail=True)
        for entry in entries:
            path = str(entry["name"])
            name = path.rsplit("/", 1)[-1]
            if shard.is_name(name):
                size = entry["size"]  # HTTP lists none
                self._sizes[name] = self._fs.info(path)["size"] if size is None else size
        if not self._sizes:
            raise FileNotFoundError("there are no shards in it")

    def _take_outcomes(self) -> None:
        """Learn which clips are known to be bad."""
        with self._reading():
            path = f"{self._root}/outcomes.jsonl"
            lines = self._fs.cat_file(path).splitlines() if self._fs.exists(path) else []
        for line in lines:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):  # cut short by a kill
                continue
            self.outcomes.set(str(key), value)
        self.outcomes.flush()

    def put(self, key: str, features: Features) -> None:
        """Refused.

        Raises:
            StoreError: always.
        """
        raise StoreError(self._refusal("a feature"))

    def claim(self, keys: Sequence[str], limit: int | None = None) -> list[str]:
        """Nothing can be computed for this store.

        Raises:
            StoreError: one of the keys is missing.
        """
        missing = self.missing(keys)
        if missing:
            raise StoreError(self._refusal(f"{len(missing)} or more features"))
        return []

    def need(self, keys: Iterable[str]) -> None:
        """Nothing: what the local copy evicts can be fetched again."""

    def _refusal(self, what: str) -> str:
        return (
            f"{self.url} lacks {what} and is read only; fill a store in a folder (mmemo encode "
            f"CONFIG --store.path=DIR) and copy that to it, such as with aws s3 sync DIR {self.url}"
        )

    def _names(self) -> set[str]:
        return super()._names() | self._sizes.keys()

    def _index(self, name: str) -> dict[str, FeaturePlace]:
        if (self._shards / name).exists() or name not in self._sizes:
            return super()._index(name)
        path = f"{self._root}/shards/{name}"
        with self._reading():
            return shard.parse_index(
                Path(f"{self.url}/shards/{name}"),
                self._sizes[name],
                lambda start, end: self._fs.cat_file(path, start=start, end=end),
            )

    def _read(self, key: str) -> Features | None:
        name = self._places[key][0]
        if name in self._sizes and not (self._shards / name).exists():
            self._fetch(name)
        return super()._read(key)

    def _fetch(self, name: str) -> None:
        """Copy a shard here, and check all of it."""
        temporary = self._lease.room() / name
        try:
            with self._reading():
                self._fs.get_file(f"{self._root}/shards/{name}", str(temporary))
                shard.verify_shard(temporary, name)
            with self._lease():
                self._make_room(self._sizes[name])
                temporary.replace(self._shards / name)
        finally:
            temporary.unlink(missing_ok=True)

    def _drop(self, name: str, error: DamagedShard) -> None:
        # A damaged copy is fetched anew, which a shard that is damaged at the URL would be forever.
        if not (self._shards / name).exists():
            raise StoreError(self._damaged(error)) from error
        super()._drop(name, error)

    def _damaged(self, error: DamagedShard) -> str:
        detail = str(error).split(" is damaged ", 1)[-1].split(";", 1)[0]
        return f"a shard at {self.url} is damaged {detail}: {error.path.name}; copy it there anew"

    @contextmanager
    def _reading(self) -> Generator[None]:
        """Say in a sentence what is wrong with the URL."""
        try:
            yield
        except DamagedShard as error:
            raise StoreError(self._damaged(error)) from error
        except ImportError as error:
            raise StoreError(
                f"{self.url} needs a package that is not installed ({error}); install it with pip"
            ) from error
        except StoreError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise StoreError(
                f"{self.url} cannot be read as a feature store ({type(error).__name__}: {error}); "
                "check the URL and your credentials"
            ) from error
