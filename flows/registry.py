"""What the commands about releases say: lines for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from tasks.contracts.errors import ReleaseError, SpecError
from tasks.contracts.release import Promotion, Release
from tasks.contracts.settings import Settings
from tasks.report import history
from tasks.stores import registry
from tasks.stores.base import GRACE, Store, open_store
from tasks.stores.loader import Pulled, pull, verify_folder
from tasks.stores.retention import collect
from tasks.stores.signing import Keys, keys_from, write_key_pair

Lines = Iterator[str]


@dataclass(frozen=True)
class Registry:
    """The releases in a store, and the keys that count."""

    store: Store
    keys: Keys

    def releases(self, name: str) -> Lines:
        """One line each, the newest last."""
        now, there = registry.champion(self.store, name).release, registry.numbers(self.store, name)
        if not there:
            yield f"{name} has no releases in {self.store}"
        for number in there:
            try:
                release = registry.read_release(self.store, name, number).release
            except ReleaseError as error:
                yield f"{number}  {error.problem}"
            else:
                yield f"{number}  {release.created}  {_headline(release)}{'  champion' if number == now else ''}"

    def history(self, name: str, *, last: int, plot: Path | None) -> Lines:
        """A line for each of the last runs, and for each promotion; the newest at the end.

        Raises:
            SpecError: if the plot's file is of another kind than .png and .html, or cannot be written.
            ReleaseError: if there is nothing to plot.
        """
        if plot is not None and plot.suffix not in (".png", ".html"):
            raise SpecError(f"A plot cannot be written as {plot.name}.", remedy="Name a file ending in .png or .html.")
        log = registry.champion(self.store, name).log
        nights = history.nights_of(self.store, name, last)
        yield from history.aligned([history.COLUMNS, *map(history.cells, nights)]) if nights else ()
        if not nights:
            yield f"{name} has no runs in {self.store}"
        good = registry.last_good_run(self.store, name)
        if good is not None:
            yield f"last good run, or night with nothing changed: {good.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        yield ""
        yield from map(_moved, log) if log else [f"{name} never had a champion in {self.store}"]
        if plot is not None:
            _write_plot(plot, name, nights)
            yield f"plot: {plot}"

    def show(self, name: str, number: int | None) -> Lines:
        """One release; the champion if no number is given."""
        found = registry.read_release(self.store, name, self._number(name, number), self.keys)
        release = found.release
        yield f"release {release.number} of {name}, {release.created}, {found.signature}"
        yield f"scores: {_headline(release)}"
        yield f"run: {release.run}, parent: {release.parent or 'none'}"
        for engine in release.engines:
            yield f"engine: {engine.runtime} {engine.version} on {engine.hardware}: {self.store}/{engine.engine.key}"
        yield f"record: {self.store}/{release.record.key}"
        yield f"report: {self.store}/{release.report.key}"
        for field, value in release.provenance.model_dump().items():
            yield f"{field}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}"

    def promote(self, name: str, number: int) -> Lines:
        """Make a release the champion, if it is not."""
        if registry.champion(self.store, name).release == number:
            yield f"release {number} of {name} is champion already"
        else:
            yield _became(name, registry.promote(self.store, name, number, self.keys))

    def rollback(self, name: str) -> Lines:
        """Make the champion before this one the champion again."""
        yield _became(name, registry.rollback(self.store, name, self.keys))

    def verify(self, target: str, number: int | None) -> Lines:
        """A release in the store with all its artifacts, or a pulled folder without any store."""
        if number is None and ("/" in target or (Path(target) / "release.json").is_file()):
            pulled = verify_folder(Path(target), self.keys)
            yield f"{target}: {_named(pulled.release)}, engine complete, {pulled.signature}"
            return
        found = registry.verify(self.store, target, self._number(target, number), self.keys)
        yield f"{_named(found.release)}: all artifacts complete, {found.signature}"

    def compare(self, name: str, one: int, other: int) -> Lines:
        """What differs between two releases."""
        releases = [registry.read_release(self.store, name, number, self.keys).release for number in (one, other)]
        differences = [*registry.compare(*releases)]
        for field, before, after in differences:
            yield f"{field}: {before} -> {after}"
        if not differences:
            yield f"releases {one} and {other} of {name} differ in nothing"

    def collect(self, *, keep_releases: int, keep_days: float, delete: bool) -> Lines:
        """What nothing keeps, and its size."""
        entries = collect(self.store, delete=delete, keep_releases=keep_releases, keep_days=keep_days)
        for entry in entries:
            yield f"{entry.key}  {entry.size_bytes} bytes"
        size = f"{len(entries)} keys, {sum(entry.size_bytes for entry in entries) / 2**20:.1f} MiB"
        yield f"deleted: {size}" if delete else f"would be deleted with --delete: {size}"
        if delete:
            yield f"half-done uploads and writes removed: {self.store.remove_leftovers(older_than=GRACE)}"

    def pull(self, name: str, *, to: Path, number: int | None, hardware: str | None) -> Lines:
        """Fetch an engine into a new folder."""
        pulled: Pulled = pull(name, to=to, number=number, hardware=hardware, store=self.store, keys=self.keys)
        yield f"{pulled.folder}: {_named(pulled.release)}, {pulled.engine.name}, {pulled.signature}"

    def _number(self, name: str, number: int | None) -> int:
        number = number or registry.champion(self.store, name).release
        if number is None:
            raise ReleaseError(f"{name} has no champion in {self.store}.", remedy="Promote a release, or name one.")
        return number


def open_registry() -> Registry:
    """As the settings say."""
    settings = Settings()
    return Registry(open_store(settings.store), keys_from(settings))


def keygen(path: Path) -> Lines:
    """Make a key pair."""
    public, key_id = write_key_pair(path)
    yield f"private key: {path} (REQUANT_SIGNING_KEY where releases are made)"
    yield f"public key: {public} (REQUANT_TRUSTED_KEYS where they are used)"
    yield f"key id: {key_id}"


def _write_plot(plot: Path, name: str, nights: tuple[history.Night, ...]) -> None:
    if not nights:
        raise ReleaseError(f"{name} has no runs to plot.", remedy="See `requant run`.")
    from tasks.report.html import history_as_html  # with matplotlib, which takes a second to load
    from tasks.report.plots import history_figure, image_of

    html = plot.suffix == ".html"
    content = history_as_html(name, nights).encode() if html else image_of(history_figure(nights), "png")
    try:
        plot.write_bytes(content)
    except OSError as error:
        raise SpecError(f"{plot} cannot be written: {error.strerror}.", remedy="Name another file.") from error


def _named(release: Release) -> str:
    return f"release {release.number} of {release.model}"


def _became(name: str, promotion: Promotion) -> str:
    return f"release {promotion.release} of {name} is champion (was {promotion.previous or 'none'})"


def _moved(promotion: Promotion) -> str:
    return (
        f"{promotion.sequence}  {promotion.when}  {promotion.why}  release {promotion.release} "
        f"(was {promotion.previous or 'none'})"
    )


def _headline(release: Release) -> str:
    scores = release.scores
    return (
        f"top-1 {scores.int8_top1:.2f} % (drop {scores.top1_drop:.2f}), {scores.int8_ms:.3g} ms at batch "
        f"{scores.batch_size} ({scores.speedup:.2f} x), {scores.int8_bytes / 2**20:.2f} MiB"
    )
