"""Which training pictures a linear probe learns from and which it validates on."""

import random
from collections.abc import Sequence

from declip_cli.errors import EvaluateError


def hold_out(labels: Sequence[int], *, seed: int) -> tuple[list[int], list[int]]:
    """Keep a fifth of each class for validation.

    Args:
        labels: the class of each picture, N.
        seed: draws which ones.

    Returns:
        Numbers of the pictures to train on and of those held out, both in order; a class with one picture
        keeps it for training, one with two to seven holds out one.

    Raises:
        EvaluateError: no class has two pictures.
    """
    held: set[int] = set()
    for label, numbers in _by_class(labels, range(len(labels))).items():
        count = max(1, round(len(numbers) / 5)) if len(numbers) > 1 else 0
        held.update(random.Random(f"hold-out {seed} {label}").sample(numbers, count))
    if not held:
        raise EvaluateError(
            "no class has two training pictures, so none can be held out to choose the penalty on",
            remedy="add training pictures, or a split val/ with one subfolder per class",
        )
    return [number for number in range(len(labels)) if number not in held], sorted(held)


def choose_shots(
    labels: Sequence[int], numbers: Sequence[int], *, shots: int, seed: int, names: Sequence[str]
) -> list[int]:
    """Draw the same number of training pictures of each class.

    Args:
        labels: the class of each picture of the set, N.
        numbers: the pictures to draw from.
        shots: how many of each class.
        seed: draws which ones; with the same seed, more shots contain the fewer.
        names: class names, for the message.

    Returns:
        Numbers of the pictures, in order.

    Raises:
        EvaluateError: a class has too few.
    """
    chosen: list[int] = []
    for label, members in _by_class(labels, numbers).items():
        if len(members) < shots:
            raise EvaluateError(
                f"--shots {shots} asks for more training pictures than the class {names[label]!r} has "
                f"({len(members)} beside the validation pictures)",
                remedy=f"--shots {len(members)} or fewer",
            )
        order = list(members)
        random.Random(f"shots {seed} {label}").shuffle(order)
        chosen += order[:shots]
    return sorted(chosen)


def _by_class(labels: Sequence[int], numbers: Sequence[int]) -> dict[int, list[int]]:
    classes: dict[int, list[int]] = {}
    for number in numbers:
        classes.setdefault(labels[number], []).append(number)
    return classes
