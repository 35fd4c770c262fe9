"""Which planted defects the data contract finds, on real images, and what it says of the same images without them.

    python tests/benchmarks/bench_detection.py FOLDER [--images 600] [--classes 10]

FOLDER has a sub-folder per class. A stratified sample of it is copied; each kind of defect is planted in a copy of its
own, in three images or where it belongs, and only findings that are new count as found.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from tasks.contracts.records import DataCheck
from tasks.contracts.spec import DataSpec, ModelSpec, RunSpec
from tasks.data.contract import check_contract, take_manifest
from tasks.data.images import prepare_images
from tasks.stores.local import LocalStore

Plant = Callable[[Path, list[Path]], dict[str, object] | None]  # may say how the spec changes
PLANTED = 3
RECIPE = {"resize": 64, "crop": 64, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def rewrite(change: Callable[[Image.Image], Image.Image], ending: str = ".png", **options: object) -> Plant:
    """Replace each victim by what `change` makes of it."""

    def plant(_: Path, victims: list[Path]) -> None:
        for path in victims:
            image = Image.open(path).convert("RGB")
            path.unlink()
            change(image).save(path.with_suffix(ending), **options)  # type: ignore[arg-type]

    return plant


def content(make: Callable[[bytes], bytes]) -> Plant:
    """Replace each victim's bytes."""

    def plant(_: Path, victims: list[Path]) -> None:
        for path in victims:
            path.write_bytes(make(path.read_bytes()))

    return plant


def noise(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.random.default_rng(image.width).integers(0, 256, (*image.size[::-1], 3), np.uint8))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def animate(_: Path, victims: list[Path]) -> None:
    """A second frame that is the first one mirrored."""
    for path in victims:
        image = Image.open(path).convert("RGB")
        path.unlink()
        image.save(path.with_suffix(".webp"), save_all=True, append_images=[ImageOps.mirror(image)])


def halves(image: Image.Image) -> Image.Image:
    pixels = np.zeros(image.size[::-1], np.uint8)
    pixels[image.height // 2 :] = 255
    return Image.fromarray(pixels)


def copies(root: Path, victims: list[Path]) -> None:
    """Byte for byte, beside themselves."""
    for path in victims:
        shutil.copy(path, path.with_name(f"copy-{path.name}"))


def near_copies(root: Path, victims: list[Path]) -> None:
    """Compressed once more."""
    for path in victims:
        Image.open(path).convert("RGB").save(path.with_name(f"near-{path.stem}.jpg"), quality=75)


def two_labels(root: Path, victims: list[Path]) -> None:
    """The same image in another class."""
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    for path in victims:
        other = next(folder for folder in classes if folder != path.parent)
        shutil.copy(path, other / f"other-{path.name}")


def strangers(root: Path, victims: list[Path]) -> dict[str, object]:
    """A class that the model does not know."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    (root / "zz_stranger").mkdir()
    for path in victims:
        path.rename(root / "zz_stranger" / path.name)
    return {"model": ModelSpec(class_names=tuple(classes))}


def leak(root: Path, victims: list[Path]) -> dict[str, object]:
    """The gate's own source holds training images, compressed once more."""
    gate = root.with_name("gate")
    for folder in root.iterdir():
        files = sorted(folder.iterdir())
        (gate / folder.name).mkdir(parents=True)
        files[-1].rename(gate / folder.name / files[-1].name)
    near = gate / victims[0].parent.name
    for path in victims:
        Image.open(path).convert("RGB").save(near / f"near-{path.stem}.jpg", quality=75)
    return {"gate_source": str(gate)}


def night(root: Path, victims: list[Path]) -> dict[str, object]:
    """The gate is of other light than what is calibrated on."""
    gate = root.with_name("gate")
    for folder in root.iterdir():
        (gate / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[::3]:
            image = Image.open(path).convert("RGB").point(lambda value: value // 2)
            path.unlink()
            image.save(gate / folder.name / path.with_suffix(".png").name)
    return {"gate_source": str(gate)}


def recipe(**changes: object) -> Plant:
    return lambda root, victims: {"preprocess": {**RECIPE, **changes}}


DEFECTS: dict[str, tuple[str, Plant]] = {
    "truncated": ("decodes", content(lambda old: old[: len(old) // 2])),
    "zero bytes": ("decodes", content(lambda old: b"")),
    "HTML": ("decodes", content(lambda old: b"<!doctype html><title>404</title>")),
    "random pixels": ("correlation", rewrite(noise)),
    "constant": ("contrast", rewrite(lambda image: Image.new("RGB", image.size, (90, 90, 90)))),
    "two labels": ("agrees", two_labels),
    "unknown class": ("labelled", strangers),
    "icon": ("short_side", rewrite(lambda image: image.resize((7, 7)))),
    "strip": ("aspect", rewrite(lambda image: image.resize((image.width, max(8, image.width // 5))))),
    "CMYK": ("plain_mode", rewrite(lambda image: image.convert("CMYK"), ".jpg")),
    "animation": ("num_frames", animate),
    "turned by EXIF": ("upright", rewrite(lambda image: image, ".jpg", exif=turned())),
    "copy": ("unique", copies),
    "near copy": ("distinct", near_copies),
    "dark": ("brightness", rewrite(lambda image: image.point(lambda value: value // 20))),
    "two-valued": ("entropy", rewrite(halves)),
    "blurred": ("sharpness", rewrite(lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 8)))),
    "leak into the gate": ("alike", leak),
    "forgotten normalisation": ("spread", recipe(mean=(0.0,) * 3, std=(1.0,) * 3)),
    "doubled normalisation": ("spread", recipe(std=(0.05,) * 3)),
    "normalised in 0..255": ("offset", recipe(mean=(124.0, 116.0, 104.0), std=(58.0, 57.0, 57.0))),
    "other light": ("drift_psi", night),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--classes", type=int, default=10, help="joined into so many, if there are more")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        clean = home / "clean"
        victims = sample(options.folder, clean, options.images, options.classes)
        before = judge(clean, home, {})
        print(f"clean: {before.num_images} images, {len(before.breaches)} critical findings, warnings:",
              ", ".join(f"{finding.rule} ({finding.observed})" for finding in before.warnings) or "none")  # fmt: skip
        known = {finding.rule: finding.num_offenders for finding in before.findings}
        print("\n| planted | rule | new offenders | failed | severity |\n| --- | --- | --- | --- | --- |")
        missed = 0
        for name, (rule, plant) in DEFECTS.items():
            place = home / name.replace(" ", "-")
            root = place / "images"
            shutil.copytree(clean, root)
            changes = plant(root, [root / path for path in victims]) or {}
            finding = next(finding for finding in judge(root, place, changes).findings if finding.rule == rule)
            new = finding.num_offenders - known.get(rule, 0)
            found = new >= PLANTED if finding.num_offenders else not finding.passed
            missed += not found
            print(f"| {name} | {rule} | {new} | {'no' if finding.passed else 'yes'} | {finding.severity} |"
                  + ("" if found else " **MISSED**"), flush=True)  # fmt: skip
            shutil.rmtree(place)
        print(f"\n{len(DEFECTS) - missed} of {len(DEFECTS)} kinds found")


def sample(folder: Path, into: Path, count: int, num_classes: int) -> list[str]:
    """Copy images of all classes; of three of them the relative paths, which become victims."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [sorted(path for path in name.iterdir() if path.is_file()) for name in classes]
    per_class = max(1, count // len(classes))
    for number, members in enumerate(files):
        target = into / f"class{number % num_classes:02}"
        target.mkdir(parents=True, exist_ok=True)
        for path in members[:per_class]:
            shutil.copy(path, target / f"{number:04}-{path.name}")
    first = sorted((into / "class00").iterdir())[:PLANTED]
    return [path.relative_to(into).as_posix() for path in first]


def judge(root: Path, place: Path, changes: dict[str, object]) -> DataCheck:
    model = changes.pop("model", ModelSpec())
    data = {"source": str(root), "preprocess": RECIPE, "checks": {}, **changes}
    count = sum(len(list(folder.iterdir())) for folder in root.iterdir())
    data["calibration"] = max(128, count // 4)
    spec = RunSpec(name="detection", model=model, data=DataSpec.model_validate(data))
    scratch = place / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return check_contract(
        spec,
        take_manifest(spec.data, scratch),
        lambda: prepare_images(spec.model, spec.data, spec.seed, scratch),
        None,
        LocalStore(place / "store"),
        scratch,
    )


if __name__ == "__main__":
    main()
