"""Step: the champion's engine on this run's gate images, so that the challenger is compared image by image."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from tasks.build_engine import open_engine
from tasks.contracts.errors import ReleaseError
from tasks.contracts.records import ChampionScore, DataRecord, EngineRecord, EngineScore
from tasks.contracts.release import Release
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.engines.plan import differences
from tasks.engines.tensorrt import this_machine
from tasks.scoring.accuracy import accuracy_of, compare, load_predictions, predict, save_predictions
from tasks.step import Progress, remember, step, the_gpu, the_images, the_store
from tasks.stores.base import Store
from tasks.stores.registry import champion, read_release
from tasks.stores.signing import keys_from
from tasks.stores.steps import JSON


@step("score champion")
def score_champion(spec: RunSpec, data: DataRecord, engine: EngineRecord, score: EngineScore) -> ChampionScore | None:
    """None if there is no champion yet, it is this very engine, or it cannot be compared.

    A champion that is refused or damaged, or that takes other images, is said to be so and is not in the way of a
    sound one.
    """
    store, logger, name = the_store(), get_run_logger(), spec.name
    number = champion(store, name).release
    if number is None:
        logger.info("%s has no champion yet", name)
        return None
    try:
        release = read_release(store, name, number, keys_from(Settings())).release
    except ReleaseError as error:
        logger.warning("the champion is not compared: %s", error)
        return None
    rival = release.engines[0]
    if rival.engine == engine.engine:
        logger.info("release %d of %s, the champion, is this very engine", number, name)
        return None
    obstacle = "has lost its engine" if not store.holds(rival.engine) else _obstacle(release, data, spec)
    if obstacle:
        logger.warning("the champion is not compared: release %d of %s %s", number, name, obstacle)
        return None

    def compute(store: Store, work: Path) -> ChampionScore:
        gate, progress = the_images(spec, data).split("gate"), Progress("scoring the champion")
        with open_engine(rival, spec.target, work) as running:
            batches = gate.batches(spec.evaluation.batch_size)
            predictions = predict(running.answer, batches, num_images=len(gate), progress=progress)
        path = work / "predictions.npz"
        save_predictions(predictions, path)
        challenger = load_predictions(store.fetch(score.accuracy.predictions, work))
        return ChampionScore(
            release=release.number,
            accuracy=accuracy_of(predictions, len(data.class_names), store.put(path, kind="predictions")),
            comparison=compare(predictions, challenger, data.class_names),
            bytes=rival.engine.size_bytes,
        )

    inputs: dict[str, JSON] = {
        "images": data.digest,
        "champion": rival.model_dump(mode="json"),
        "number": release.number,
        "challenger": score.accuracy.predictions.sha256,
    }
    return remember("score_champion", __name__, inputs, ChampionScore, compute)


def _obstacle(release: Release, data: DataRecord, spec: RunSpec) -> str:
    """Why the same images cannot be put to both; empty if they can."""
    if release.serving.labels != data.class_names:
        return "has other labels"
    if release.serving.preprocess != data.preprocess:
        return "has other preprocessing"
    rival = release.engines[0]
    if rival.runtime != spec.target.runtime:
        return "has another runtime"
    if rival.plan is not None and (found := "; ".join(differences(rival.plan, this_machine(the_gpu())))):
        return f"was built for another machine: {found}"
    return ""
