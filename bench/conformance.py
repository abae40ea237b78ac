"""Whether a method keeps the rules of `methods.api`: tried on tiny cells, and told in words."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import checkpoint, interface, trial
from bench.errors import Diverged, SuiteError
from bench.prunable import prunable_names
from bench.recipes import Recipe
from bench.scrutiny import (
    SIZED,
    Outcome,
    attributes,
    few_cuts,
    finished,
    listed,
    marks,
    outcome,
    watched,
)
from bench.trainer import Trainer
from methods.api import OptimizerSettings, SparsityMethod

CHECKS = {
    "interface": "a frozen dataclass, whose hooks return what they should",
    "runs": "it trains to the end",
    "density exact": "the finished network has as many non-zeros as asked for",
    "masks hold": "what the masks prune is zero after every step and in each training pass",
    "plain network": "it leaves the plain network, finite",
    "same tensors": "no tensor of a run is replaced by another",
    "same twice": "the same cell twice gives the same bits",
    "resume": "a run cut in any phase goes on as if it had not been",
    "metered": "what it computes on data beside the steps is counted",
    "no test data": "nothing asks for the test images",
    "silent": "nothing is printed",
    "harness": "it knows nothing of the harness",
}
"""Check -> what is true where it holds."""

KEY = "0123456789ab"

PLENTY = 60
"""Plans of more steps get a smaller budget."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A tiny cell.

    Attributes:
        network: for people.
        model: name in `trial.NETWORKS`.
        recipe: how it is trained; `training` says it for people.
        steps: length of the budget.
        others: more densities, in short runs.
        again: whether the run is repeated, and resumed from cuts.
    """

    network: str
    training: str
    model: str
    recipe: Recipe
    steps: int
    others: tuple[float, ...] = ()
    again: bool = True

    @property
    def words(self) -> str:
        """The cell, for people."""
        return f"{self.network}, {self.training}"


WITH_DECAY = "SGD with momentum and weight decay"
SETTINGS = (
    Setting("conv net", WITH_DECAY, "conv", trial.SGD, 20, (0.5, 0.02)),
    Setting("MLP", "Adam with weight decay", "mlp", trial.ADAM, 20, (0.5, 0.02)),
    Setting("timm resnet18", WITH_DECAY, "timm", trial.SGD, 4, again=False),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        check: one of `CHECKS`.
        ok: None where it was not checked; the text says why.
        text: what is so.
    """

    check: str
    ok: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was found out about a method."""

    method: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Nothing is broken, and the method ran at all."""
        return not self.broken and any(f.check == "runs" and f.ok for f in self.findings)

    @property
    def broken(self) -> tuple[str, ...]:
        """What is broken, such as `masks hold: conv1.weight has ...`."""
        return tuple(f"{f.check}: {f.text}" for f in self.findings if f.ok is False)

    @property
    def text(self) -> str:
        """A line for each finding, and the verdict."""
        words = {True: "holds", False: "BROKEN", None: "not checked"}
        lines = [f"{words[f.ok]:<13}{f.check}: {f.text}" for f in self.findings]
        return "\n".join(
            [*lines, f"{self.method} {'conforms' if self.ok else 'does not conform'}."]
        )


def check_method(
    method: SparsityMethod | type[SparsityMethod], settings: Sequence[Setting] = SETTINGS
) -> Report:
    """Tries a method on tiny cells; takes some seconds.

    Args:
        method: an instance with its options, or a class for its defaults.
        settings: the cells.

    Returns:
        What holds and what is broken; an error inside the method is a finding too.
    """
    examination = _Examination(method)
    with torch.random.fork_rng([]):
        examination.look(settings)
    return examination.report()


class _Examination:
    """One method on trial: what was found, by check."""

    def __init__(self, method: SparsityMethod | type[SparsityMethod]) -> None:
        self.method = method
        self.kind = method if isinstance(method, type) else type(method)
        self.source = interface.source_of(self.kind)
        self.found: dict[str, list[Finding]] = {check: [] for check in CHECKS}
        self.touches: list[str] = []
        self.asked: dict[str, str] = {}

    def report(self) -> Report:
        """Findings in the order of the checks; where one is broken, only that is told."""
        findings: list[Finding] = []
        for check, holds in CHECKS.items():
            ordered = dict.fromkeys(self.found[check])
            broken = [finding for finding in ordered if finding.ok is False]
            where = ", ".join(finding.text for finding in ordered if finding.ok and finding.text)
            if broken:
                findings += broken
                continue
            if any(finding.ok for finding in ordered):
                findings.append(Finding(check, True, f"{holds} ({where})" if where else holds))
            findings += [finding for finding in ordered if finding.ok is None]
        return Report(self.kind.__name__, tuple(findings))

    def tell(self, check: str, faults: Sequence[str], setting: Setting | None = None) -> bool:
        """Notes what a check found, and returns whether it holds."""
        place = f" ({setting.words})" if setting else ""
        found = [Finding(check, False, fault + place) for fault in faults]
        self.found[check] += found or [Finding(check, True, setting.network if setting else "")]
        return not faults

    def skip(self, check: str, reason: str) -> None:
        """Notes that a check was left out."""
        self.found[check].append(Finding(check, None, reason))

    def fresh(self) -> SparsityMethod:
        """An instance that nothing was done with yet."""
        return self.method() if isinstance(self.method, type) else dataclasses.replace(self.method)

    def look(self, settings: Sequence[Setting]) -> None:
        """Every check."""
        with _overheard() as said, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.tell("interface", list(interface.class_faults(self.kind, self.fresh))):
                self.marks = marks(self.kind)
                for setting in settings:
                    self.setting(setting)
        knowledge = interface.harness_faults(self.kind)
        if knowledge is None:
            self.skip("harness", "its source is not at hand")
        if knowledge is not None or self.asked:
            self.tell("harness", [*(knowledge or ()), *self.asked.values()])
        lines = said.getvalue().strip().splitlines()
        self.tell("silent", [f"it prints, such as {lines[0]!r}"] if lines else [])
        if self.found["runs"]:
            self.tell("no test data", self.touches[:1])

    def setting(self, setting: Setting) -> None:
        """All that is checked on one tiny cell."""
        try:
            if (steps := self.prepared(setting)) is not None:
                with tempfile.TemporaryDirectory() as folder:
                    self.trained(setting, steps, Path(folder))
        except SuiteError as error:  # no weight to prune
            self.skip("runs", f"{error} ({setting.words})")
        except Diverged as error:
            self.tell("runs", [f"it leaves the finite numbers: {error}"], setting)
        except trial.NotOfRun:
            self.skip("runs", f"stopped at what it asks of its run ({setting.words})")
        except (Exception, SystemExit) as error:
            self.tell("runs", [f"it {interface.in_words(error, self.source)}"], setting)

    def build(
        self, setting: Setting, steps: int, witness: trial.Witness | None = None, **changes: Any
    ) -> Trainer:
        """The tiny cell anew: new network, new data streams, new state, new instance."""
        data = trial.without_test(trial.images(setting.recipe), self.touched)
        method = (witness or self.witness()).over(self.fresh())
        model, recipe = setting.model, setting.recipe
        return trial.make_trainer(method, model, recipe, steps=steps, data=data, **changes)

    def witness(self) -> trial.Witness:
        """For one run."""
        return trial.Witness(
            lambda name: self.asked.setdefault(name, f"it {trial.asks(name)}{self.place()}")
        )

    def touched(self) -> None:
        """Notes who looks for the test images."""
        self.touches.append(f"it asks for the test images{self.place()}")

    def place(self) -> str:
        """The line of the method's source that is running."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename == self.source]
        return f" ({Path(self.source).name}:{frames[-1].lineno})" if frames else ""

    def prepared(self, setting: Setting) -> int | None:
        """Checks the hooks before training; steps of the budget to try, None if there is none."""
        method, recipe, steps = self.fresh(), setting.recipe, setting.steps
        model, data = trial.network(setting.model), trial.images(recipe)
        if not self.tell("interface", list(interface.prunable_faults(method, model)), setting):
            return None
        names = prunable_names(model, method, "all")
        budget = trial.budget_of(steps, recipe, data, model, names)
        try:
            plan = method.plan(budget, 0.1 if method.controls in SIZED else None)
        except ValueError as error:
            self.skip("runs", f"the method needs something else: {error} ({setting.words})")
            return None
        faults = list(interface.plan_faults(plan))
        if not faults:
            settings = OptimizerSettings(recipe.optimizer, recipe.momentum, recipe.nesterov)
            shape = data.info.shape
            faults += interface.structure_faults(method, model, names, shape, settings)
        if not faults:
            faults += self.penalty_faults(self.build(setting, steps))
        if not self.tell("interface", faults, setting):
            return None
        total = sum(phase.steps for phase in plan)
        return max(4, steps * PLENTY // total) if total > PLENTY else steps

    def penalty_faults(self, run: Trainer) -> list[str]:
        """What is wrong with the penalty of the first step."""
        try:
            with torch.no_grad():
                run.method.start_phase(run)
            return list(interface.penalty_faults(run.method.penalty(run.state)))
        except Exception:  # comes again in the run, with its step
            return []

    def trained(self, setting: Setting, steps: int, folder: Path) -> None:
        """Trains to the end, and looks at everything on the way and after."""
        witness = self.witness()
        trainer = self.build(setting, steps, witness)
        at = few_cuts(trainer.plan) if setting.again else ()

        def save(done: int) -> None:
            if done in at:
                checkpoint.write(trainer, folder / str(done), KEY)

        before = attributes(trainer)
        faults = watched(trainer, witness, save)
        expected = outcome(trainer)
        self.tell("runs", [], setting)
        faults |= finished(trainer, trial.network(setting.model))
        for check, texts in faults.items():
            self.tell(check, texts, setting)
        if not faults["plain network"]:
            for check in {"masks hold", "density exact"} - faults.keys():
                self.skip(check, f"nothing was promised: controls = {trainer.method.controls!r}")
        for density in setting.others if trainer.density is not None else ():
            other = trial.train(self.build(setting, 4, density=density))
            texts = finished(other, trial.network(setting.model)).get("density exact", [])
            self.tell("density exact", texts, setting)
        if setting.again:
            odd = sorted(attributes(trainer) - before)
            odd += [n for n, mark in marks(self.kind).items() if self.marks.get(n) != mark]
            hint = f"; kept outside TrainState: {listed(odd)}" if odd else ""
            self.repeated(setting, steps, expected, (at, folder), hint)

    def repeated(
        self,
        setting: Setting,
        steps: int,
        expected: Outcome,
        saved: tuple[Sequence[int], Path],
        hint: str,
    ) -> None:
        """Trains the same cell once more, and from each cut."""
        twice = outcome(trial.train(self.build(setting, steps))).differences(expected)
        texts = [f"trained again, the same cell differs in {listed(twice)}"] if twice else []
        self.tell("same twice", texts, setting)
        if twice:
            self.skip("resume", f"two whole runs already differ ({setting.words})")
            return
        # What is left lying around is now another cell's. The last cut goes first, so that no
        # resumed run has been where a later one begins.
        trial.train(self.build(setting, steps, seed=1))
        at, folder = saved
        for cut in reversed(at):
            resumed = self.build(setting, steps)
            try:
                checkpoint.read(resumed, folder / str(cut), KEY)
                found = outcome(trial.train(resumed)).differences(expected)
                text = f"it ends with another {listed(found)}" if found else ""
            except (Exception, SystemExit) as error:
                text = f"it {interface.in_words(error, self.source)}"
            if text:
                text = f"cut after step {cut} of {resumed.total_steps} and resumed, {text}{hint}"
                self.tell("resume", [text], setting)
                return
        self.tell("resume", [], setting)


@contextlib.contextmanager
def _overheard() -> Iterator[io.StringIO]:
    """What is printed, also to the streams that the process began with."""
    said = io.StringIO()
    kept = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__", "__stderr__")}
    try:
        for name in kept:
            setattr(sys, name, said)
        yield said
    finally:
        for name, stream in kept.items():
            setattr(sys, name, stream)
