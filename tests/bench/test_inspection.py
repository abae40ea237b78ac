"""What a network's accuracy makes of a cell."""

import math

import pytest

from bench.evaluate import Evaluation
from bench.inspection import judge
from bench.record import Counts

KEPT = Counts(100, 50, 90, 45, 45, 0, 1000, 500)


@pytest.mark.parametrize(("classes", "least"), [(100, 1.5), (10, 15), (4, 30), (2, 55)])
def test_a_network_has_learnt_where_it_is_well_above_chance(classes, least):
    assert judge(Evaluation(1.0, least, None), KEPT, classes) == ("ok", "")
    status, why = judge(Evaluation(1.0, least - 0.01, None), KEPT, classes)
    said = "1.5 times chance" if classes >= 10 else f"{least:.2f} %, 5 points above chance"
    assert (status, why) == ("diverged", f"accuracy {least - 0.01:.2f} % is under {said}")


def test_a_loss_that_is_not_finite_is_a_divergence_at_any_accuracy():
    assert judge(Evaluation(math.nan, 99.0, None), KEPT, 2)[0] == "diverged"
