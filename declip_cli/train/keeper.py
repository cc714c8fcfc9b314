"""What happens beside the steps: states, snapshots, evaluations, and the way back to a good state."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from declip_cli.distributed import copy_from_main, rank, world_size
from declip_cli.errors import TrainError
from declip_cli.model.checkpoint import PretrainedModel, save_model, trained_preprocessing
from declip_cli.model.clip import DualEncoder
from declip_cli.process_group import from_all
from declip_cli.train.build import Training
from declip_cli.train.checkpoint import capture_state, restore_state
from declip_cli.train.health import broken_weights
from declip_cli.train.meter import Meter
from declip_cli.train.run_dir import RunDir, SavedState

Evaluate = Callable[[PretrainedModel], dict[str, dict[str, Any]]]
"""Scores a model on every evaluation set that was asked for: name → report; called on every rank."""
FindScore = Callable[[dict[str, dict[str, Any]], str], float]
"""Finds a score in what `Evaluate` returned by its dotted name, such as `imagenet.top1`."""


class Keeper:
    """Saves, evaluates and goes back, on every rank alike; only rank 0 writes.

    Args:
        training: the parts.
        run_dir: where everything goes.
        meter: told what is no training.
        evaluate: scores the model; None leaves evaluations out.
        find_score: finds the score of `train.keep_best`.
    """

    def __init__(
        self,
        training: Training,
        run_dir: RunDir,
        meter: Meter,
        evaluate: Evaluate | None,
        find_score: FindScore | None,
    ) -> None:
        self._training, self._run_dir, self._meter = training, run_dir, meter
        self._evaluate, self._find_score = evaluate, find_score
        self._last_save = time.monotonic()

    def is_due(self) -> bool:
        """Tell whether it is time to save."""
        minutes = self._training.config.train.checkpoint_every_minutes
        return bool(minutes) and time.monotonic() - self._last_save >= 60 * (minutes or 0)

    def problem(self) -> str:
        """Say which weight is no number any more, on any rank; such a state is not worth keeping."""
        name = next((name for name in from_all(broken_weights(self._training.method)) if name), "")
        return f"a weight is no longer a number after step {self._training.step} ({name})" if name else ""

    def save(self) -> None:
        """Write the state, and the model as it is now, on rank 0."""
        training = self._training
        with self._meter.paused():
            training.seconds = self._meter.seconds()
            state = capture_state(training)
            if rank() == 0:
                self._run_dir.save_state(state, training.run, keep=training.config.train.keep_states)
                self._save_model(self._run_dir.model_path)
        self._last_save = time.monotonic()

    def _save_model(self, path: Path) -> None:
        config = self._training.config
        save_model(self._encoder(), path, config=config.model, method=config.method.name)

    def _encoder(self) -> DualEncoder:
        training = self._training
        encoder = training.method.encoder
        return encoder if training.average is None else training.average.averaged(encoder)

    def scores(self) -> dict[str, dict[str, Any]]:
        """Score the model as it is now, on all ranks together; keep it if it is the best."""
        if self._evaluate is None:
            return {}
        training = self._training
        with self._meter.paused():
            encoder, config = self._encoder(), training.config
            if world_size() > 1 and config.method.batch_norm == "rank":
                # Ranks have statistics of their own; all score the model that rank 0 saves.
                encoder = copy.deepcopy(encoder)
                copy_from_main(encoder.buffers())
            model = PretrainedModel(
                encoder=encoder.eval(),
                name="(in training)",
                method=config.method.name,
                arch=config.model.arch,
                token_wise=config.method.name == "filip",
                preprocessing=trained_preprocessing(encoder, config.model),
                context_length=encoder.architecture.text.context_length,
                fingerprint="",
            )
            scores = self._evaluate(model)
            set_training_mode(training)
            key = config.train.keep_best
            if key and self._find_score is not None and rank() == 0:
                self._keep_best(key, self._find_score(scores, key))
        return scores

    def _keep_best(self, key: str, score: float) -> None:
        best = self._run_dir.read_best(key)
        if best is None or score > best:
            self._save_model(self._run_dir.best_path)
            self._run_dir.write_best(key=key, score=score, step=self._training.step)

    def go_back(self, problem: str) -> None:
        """Take up the last good state again, at half the rate.

        Raises:
            TrainError: there is none, or it was tried often enough.
        """
        training, path = self._training, self._run_dir.path
        num, allowed = training.num_rollbacks + 1, training.config.train.max_rollbacks
        if num > allowed or not self._run_dir.has_state():
            tried = f"; going back to a good state {allowed} times did not help" if num > allowed else ""
            raise TrainError(
                f"{problem}{tried}",
                remedy=f"go on from the last good state: declip pretrain --resume {path} --learning-rate "
                f"{training.schedule.peak / 2 ** (num + 1):.1e}, or start again with that",
            )
        state = load_same_state(self._run_dir)
        restore_state(training, state)
        training.num_rollbacks = num
        if rank() == 0:
            self._run_dir.forget_metrics_after(training.step)
            self._run_dir.say(f"{problem}: back to step {training.step}, at 1/{2**num} of the rate")
        self._meter.forget()


def load_same_state(run_dir: RunDir) -> SavedState:
    """Read the newest state that every rank can read.

    Raises:
        TrainError: there is none.
    """
    state = run_dir.load_state()
    step = min(from_all(state.step))
    return state if step == state.step else run_dir.load_state(before=step + 1)


def set_training_mode(training: Training) -> None:
    """Put all into training mode but for frozen towers, whose BatchNorm stays as it is."""
    training.method.train()
    for name in training.config.train.freeze:
        tower = training.method.encoder.visual if name == "image" else training.method.encoder.text
        tower.eval()
