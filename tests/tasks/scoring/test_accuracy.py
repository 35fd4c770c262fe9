from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.stats import chi2

from tasks.contracts.errors import EngineError, StoreError
from tasks.contracts.records import ArtifactRef
from tasks.scoring.accuracy import (
    Predictions,
    accuracy_of,
    best_classes,
    compare,
    load_predictions,
    paired_interval,
    predict,
    save_predictions,
)

REF = ArtifactRef(key="predictions/0", sha256="0" * 64, size_bytes=1)


def predictions_of(labels: list[int], top1: list[int]) -> Predictions:
    return Predictions(labels=np.array(labels), top=np.array(top1, np.int32)[:, None])


def in_batches(logits_NC: np.ndarray, labels_N: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The logits themselves serve as pixels; the model that answers is the identity."""
    for start in range(0, len(labels_N), size):
        yield logits_NC[start : start + size], labels_N[start : start + size]


def test_the_best_classes_come_first_and_ties_go_to_the_lower_index() -> None:
    """Worked out by hand, with ties inside and across the border of the best five."""
    logits_NC = np.array([[0, 3, 3, -1, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1], [-9, -8, -7, -6, -5, -4, -3]], np.float32)
    assert best_classes(logits_NC).tolist() == [[1, 2, 4, 0, 5], [0, 1, 2, 3, 4], [6, 5, 4, 3, 2]]


def test_fewer_than_five_classes_give_fewer_answers() -> None:
    """Three classes, three answers."""
    assert best_classes(np.array([[0.1, 0.3, 0.2]], np.float32)).tolist() == [[1, 2, 0]]


@given(npst.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=st.integers(-3, 3)))
def test_the_best_classes_are_those_of_a_stable_sort(logits_NC: np.ndarray) -> None:
    """Any logits, many of them equal."""
    expected_NK = np.argsort(-logits_NC, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(best_classes(logits_NC), expected_NK)


def test_predict_puts_batches_together_and_tells_its_progress() -> None:
    """Seven images in batches of three are seven answers in order."""
    logits_NC = np.eye(7, dtype=np.float32)
    labels_N = np.arange(7)[::-1]
    seen: list[tuple[int, int]] = []
    predictions = predict(
        lambda pixels: pixels,
        in_batches(logits_NC, labels_N, 3),
        num_images=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert predictions.labels.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert predictions.top[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert predictions.top.dtype == np.int32
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_name_the_first_such_image(poison: float) -> None:
    """Image 4 is in the second batch."""
    logits_NC = np.zeros((6, 3), np.float32)
    logits_NC[4, 1] = logits_NC[5, 0] = poison
    with pytest.raises(EngineError, match="image 4 are not finite"):
        predict(lambda pixels: pixels, in_batches(logits_NC, np.zeros(6, np.int64), 3), num_images=6)


def test_images_that_never_came_are_missed() -> None:
    """A score of some images must not pass for a score of all."""
    with pytest.raises(EngineError, match="4 images were scored, 5 were expected"):
        predict(lambda pixels: pixels, in_batches(np.eye(4, dtype=np.float32), np.arange(4), 2), num_images=5)
    with pytest.raises(EngineError, match="0 images"):
        predict(lambda pixels: pixels, iter(()), num_images=0)


def test_answers_that_are_no_logits_are_refused() -> None:
    """One row per image."""
    with pytest.raises(EngineError, match=r"2 images were answered with \[1, 4\]"):
        predict(lambda pixels: pixels[:1], in_batches(np.eye(4, dtype=np.float32), np.arange(4), 2), num_images=4)


def test_accuracy_by_hand() -> None:
    """Ten images of three classes out of four; Wilson's interval of 7 in 10 as in the literature."""
    predictions = predictions_of([0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 0])
    accuracy = accuracy_of(predictions, 4, REF)
    assert accuracy.num_images == 10
    assert accuracy.top1 == 70.0
    assert accuracy.top1_interval == pytest.approx((39.68, 89.22), abs=0.01)
    assert accuracy.recall == (75.0, 200 / 3, 200 / 3, None)
    assert accuracy.confusion == ((3, 1, 0, 0), (0, 2, 1, 0), (1, 0, 2, 0), (0, 0, 0, 0))
    assert accuracy.predictions == REF


def test_top5_counts_a_label_anywhere_among_the_five() -> None:
    """Labels at rank 1, 5 and nowhere."""
    predictions = Predictions(
        labels=np.array([7, 3, 9]), top=np.array([[7, 1, 2, 3, 4], [7, 1, 2, 4, 3], [7, 1, 2, 3, 4]])
    )
    accuracy = accuracy_of(predictions, 10, REF)
    assert (accuracy.top1, accuracy.top5) == (100 / 3, 200 / 3)


def test_a_confusion_matrix_of_many_classes_is_left_out() -> None:
    """Above 100 classes it would be most of the record."""
    assert accuracy_of(predictions_of([100], [0]), 101, REF).confusion is None
    assert accuracy_of(predictions_of([99], [0]), 100, REF).confusion is not None


def test_a_model_with_more_classes_than_the_data_is_refused() -> None:
    """Class 3 does not exist among three."""
    with pytest.raises(EngineError, match=r"Class 3 .* there are 3"):
        accuracy_of(predictions_of([0], [3]), 3, REF)


def test_comparison_by_hand() -> None:
    """Of ten images, three only the float model knows and one only the engine."""
    labels = [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    float_top = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    engine_top = [0, 0, 0, 1, 0, 1, 1, 0, 2, 0]
    engine_top[2] = 2
    comparison = compare(
        predictions_of(labels, float_top), predictions_of(labels, engine_top), ("ant", "bee", "cow", "dog")
    )
    assert (comparison.only_float_right, comparison.only_engine_right) == (3, 1)
    assert comparison.top1_drop == 20.0
    assert comparison.agreement == 50.0
    assert (comparison.worst_class, comparison.class_drop) == ("bee", 100 / 4)  # of ants it is 20
    assert comparison.p_value == pytest.approx(2 * (1 + 4) / 2**4)  # four coins, three or more alike
    low, high = comparison.top1_drop_interval
    assert low < 20 < high


def test_equal_models_have_no_drop_but_keep_a_width() -> None:
    """No image told the two apart; that proves little when there are few."""
    same = predictions_of([0, 1] * 50, [0, 1] * 50)
    comparison = compare(same, same, ("ant", "bee"))
    assert (comparison.top1_drop, comparison.agreement, comparison.p_value, comparison.class_drop) == (0, 100, 1, 0)
    low, high = comparison.top1_drop_interval
    assert low == pytest.approx(-high)
    assert 1 < high < 3


def test_different_images_are_not_compared() -> None:
    """The same number of images is not enough."""
    with pytest.raises(EngineError, match="different images"):
        compare(predictions_of([0, 1], [0, 1]), predictions_of([1, 0], [0, 1]), ("ant", "bee"))


def test_the_paired_interval_agrees_with_the_usual_one_on_many_images() -> None:
    """With 50 000 images Wald's interval needs no help."""
    low, high = paired_interval(1300, 900, 50_000)
    reach = 1.959964 * np.sqrt(2200 - 400**2 / 50_000) / 50_000
    assert (low, high) == pytest.approx((100 * (0.008 - reach), 100 * (0.008 + reach)), abs=0.002)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 2000))
def test_the_paired_interval_holds_the_difference_and_mirrors(only_first: int, only_second: int, rest: int) -> None:
    """Swapping the models swaps the signs; nothing lies beyond 100 points."""
    total = only_first + only_second + rest
    if total == 0:
        return
    low, high = paired_interval(only_first, only_second, total)
    assert -100 <= low <= 100 * (only_first - only_second) / total <= high <= 100
    assert paired_interval(only_second, only_first, total) == pytest.approx((-high, -low))


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 4000 simulated gates with a true drop of one point, about 95 % of the intervals hold it."""
    b, c, _ = np.random.default_rng(0).multinomial(500, [0.03, 0.02, 0.95], size=4000).T
    held = [low <= 1.0 <= high for low, high in (paired_interval(*pair, 500) for pair in zip(b, c, strict=True))]
    assert 0.93 < np.mean(held) < 0.97


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_scores_and_comparison_tell_one_story(rows: list[tuple[int, int, int]]) -> None:
    """The drop is the difference of the accuracies, and agreement bounds it."""
    labels, float_top, engine_top = (list(column) for column in zip(*rows, strict=True))
    of_float, of_engine = predictions_of(labels, float_top), predictions_of(labels, engine_top)
    comparison = compare(of_float, of_engine, ("ant", "bee", "cow", "dog"))
    float_accuracy, engine_accuracy = accuracy_of(of_float, 4, REF), accuracy_of(of_engine, 4, REF)
    assert comparison.top1_drop == pytest.approx(float_accuracy.top1 - engine_accuracy.top1)
    assert abs(comparison.top1_drop) <= 100 - comparison.agreement + 1e-9
    assert 0 < comparison.p_value <= 1
    assert comparison.class_drop >= comparison.top1_drop - 1e-9
    low, high = float_accuracy.top1_interval
    assert 0 <= low <= float_accuracy.top1 + 1e-9
    assert float_accuracy.top1 - 1e-9 <= high <= 100


def test_p_value_is_close_to_the_chi_square_test_when_many_differ() -> None:
    """McNemar's own approximation, with the continuity correction."""
    labels = [0] * 1000
    float_top = [0] * 180 + [1] * 120 + [0] * 700
    engine_top = [1] * 180 + [0] * 120 + [0] * 700
    p_value = compare(predictions_of(labels, float_top), predictions_of(labels, engine_top), ("ant", "bee")).p_value
    assert p_value == pytest.approx(chi2.sf((abs(180 - 120) - 1) ** 2 / 300, df=1), rel=0.05)


def test_predictions_are_stored_and_read_back(tmp_path: Path) -> None:
    """The same predictions give the same bytes, and nothing else stays in the folder."""
    predictions = Predictions(labels=np.arange(5), top=np.arange(25, dtype=np.int32).reshape(5, 5))
    save_predictions(predictions, tmp_path / "one.npz")
    save_predictions(predictions, tmp_path / "two.npz")
    again = load_predictions(tmp_path / "one.npz")
    np.testing.assert_array_equal(again.labels, predictions.labels)
    np.testing.assert_array_equal(again.top, predictions.top)
    assert again.top.dtype == np.int32
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]


@pytest.mark.parametrize("content", ["missing", "text", "other arrays", "one array", "pickle"])
def test_a_file_without_predictions_is_named(tmp_path: Path, content: str) -> None:
    """Damaged, foreign or unsafe files are refused alike."""
    path = tmp_path / "foreign.npz"
    match content:
        case "text":
            path.write_text("not an archive")
        case "other arrays":
            np.savez(path, other=np.zeros(2))
        case "one array":
            with path.open("wb") as file:
                np.save(file, np.zeros(2))
        case "pickle":
            np.savez(path, labels=np.array([object()]), top=np.zeros(1))
    with pytest.raises(StoreError, match=r"foreign\.npz holds no predictions"):
        load_predictions(path)
