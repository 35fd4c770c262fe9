"""The parts of a run that another machine may do: building the engine where it will run, and training on a GPU."""

from __future__ import annotations

from prefect import flow

from tasks.build_engine import build_engine
from tasks.contracts.records import Accuracy, Built, Choice, DataRecord, ExportRecord, ModelRecord, QuantizedRecord
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.measure_engine import measure_engine
from tasks.quantize_model import quantize_model
from tasks.score_champion import score_champion
from tasks.score_engine import score_engine
from tasks.send_to_worker import answer, send_to_worker


def build_and_score(spec: RunSpec, data: DataRecord, exported: ExportRecord, baseline: Accuracy) -> Built:
    """The engine, built and judged here, or where REQUANT_BUILD_ON says for its runtime."""
    place = Settings().build_on.get(spec.target.runtime)
    if place is None:
        return _built_here(spec, data, exported, baseline)
    question = {"spec": spec, "data": data, "exported": exported, "baseline": baseline}
    return send_to_worker(place, question, spec.name, Built)


def quantize(spec: RunSpec, data: DataRecord, model: ModelRecord, choice: Choice) -> QuantizedRecord:
    """The model with INT8 simulated; trained here, or where REQUANT_TRAIN_ON says."""
    place = Settings().train_on
    if place is None or spec.quant.method != "qat":
        return quantize_model(spec, data, model, choice)
    question = {"spec": spec, "data": data, "model": model, "choice": choice}
    return send_to_worker(place, question, spec.name, QuantizedRecord)


@flow(name="build", flow_run_name="{spec.name} for {spec.target.runtime}")
def build(spec: RunSpec, data: DataRecord, exported: ExportRecord, baseline: Accuracy, answer_key: str) -> None:
    """The child that runs where the engine will run."""
    answer(answer_key, lambda: _built_here(spec, data, exported, baseline))


@flow(name="train", flow_run_name="{spec.name} training")
def train(spec: RunSpec, data: DataRecord, model: ModelRecord, choice: Choice, answer_key: str) -> None:
    """The child that runs where training is fast."""
    answer(answer_key, lambda: quantize_model(spec, data, model, choice))


def _built_here(spec: RunSpec, data: DataRecord, exported: ExportRecord, baseline: Accuracy) -> Built:
    engine = build_engine(spec, exported)
    score = score_engine(spec, data, engine, baseline)
    champion = score_champion(spec, data, engine, score)
    speed = measure_engine(spec, data, exported, engine)
    return Built(engine=engine, score=score, champion=champion, speed=speed)
