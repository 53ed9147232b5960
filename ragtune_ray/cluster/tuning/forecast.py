"""The stages of a tune, and how long those take at most whose speed is known. Which of them run depends on what fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ragtune_ray import config
from ragtune_ray.cluster.comparing import forecast
from ragtune_ray.cluster.comparing.forecast import Sizes, Step

ANSWER = "answer the training questions"


def label_stage(number: int) -> str:
    """The name of the stage that makes the training questions of a round."""
    return f"round {number}: make training questions"


def train_stage(number: int, components: str) -> str:
    """The name of the stage that trains a component in a round."""
    return f"round {number}: train the {components}"


def judge_stage(number: int, component: str) -> str:
    """The name of the stage that judges a component in a round."""
    return f"round {number}: judge the {component}"


def tuning(settings: config.Config, _: Sequence[config.Arm], sizes: Sizes) -> list[Step]:
    """All stages that a tune can have, in the order in which they run; `sizes` counts the validation questions as asked."""
    flops = forecast.product_flops()
    answered = forecast.answering(settings, "rag", sizes, flops)
    times = {"generator": forecast.training(settings, "rag+ft", sizes, flops)}
    judged = {
        "generator": dataclasses.replace(answered, seconds=None if answered.seconds is None else 2 * answered.seconds)
    }
    steps = []
    if settings.tune.mode == "staged":
        train = dataclasses.replace(sizes, num_questions=sizes.num_train)
        steps = [dataclasses.replace(forecast.answering(settings, "rag", train, flops), name=ANSWER)]
    for number in _rounds(settings.tune):
        if number and settings.tune.mode in ("iterative", "domain"):
            steps.append(Step(label_stage(number), None, None, "depends on how many pass the filters"))
        for trained, components in _trained(settings.tune, number):
            unknown = Step("", None, None, "not known before")
            steps.append(_at_most(times.get(trained, unknown), train_stage(number, trained)))
            steps += [_at_most(judged.get(each, unknown), judge_stage(number, each)) for each in components]
    return steps


def _at_most(step: Step, name: str) -> Step:
    source = step.source if step.seconds is None else f"at most, by {step.source}"
    return dataclasses.replace(step, name=name, source=source)


def _rounds(rule: config.Tune) -> Iterable[int]:
    """The numbers of the rounds; round 0 of `iterative` learns from gold answers."""
    match rule.mode:
        case "staged" | "domain":
            return [1]
        case "joint":
            return range(1, rule.rounds + 1)
        case "iterative":
            return range(rule.rounds + 1)


def _trained(rule: config.Tune, number: int) -> Iterator[tuple[str, tuple[config.Component, ...]]]:
    """What is trained in a round, in order, and the components that are judged afterwards."""
    if rule.in_loop:
        yield "retriever and generator", ("retriever", "generator")
        return
    order: tuple[config.Component, ...] = ("generator", "retriever")
    if rule.mode == "domain":
        order = ("retriever", "generator")
    for component in order:
        if component in rule.components and (component == "generator" or number):
            yield component, (component,)
