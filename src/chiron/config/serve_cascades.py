"""Models of the serve config that have no instances: cascades, for which others answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chiron.config.read import ConfigError, read_record, suggest
from chiron.config.sections import require
from chiron.core.types import RequestClass
from chiron.gateway.settings import CascadeSettings, ModelSettings
from chiron.policies.cascade import CascadeRule, Test


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCascade:
    """Two models that answer for a third: the small one is asked first."""

    first: str
    """Name of the model that is asked first."""
    then: str
    """Name of the model that is asked where the first one is unsure, or gives no answer."""
    test: Test = "logprob"
    """What tells how sure the first one is, of its tokens' log-probabilities: ``logprob``, ``margin`` or
    ``entropy``."""
    threshold: float | None = None
    """The least mean confidence of an answer that is given; default: -0.5 (logprob), 0.3 (margin), -1.0 (entropy)."""
    after_tokens: int = 16
    """Tokens after which that is decided; 0: the whole answer."""
    first_wait_s: float | None = None
    """For so long a request waits for an instance of the first model; default: half of the TTFT of its class."""

    def __post_init__(self) -> None:
        self.rule()
        wait_s = self.first_wait_s
        require(wait_s is None or wait_s > 0, "first_wait", wait_s, "above 0")

    def rule(self) -> CascadeRule:
        """Raises ValueError."""
        return CascadeRule(test=self.test, threshold=self.threshold, after_tokens=self.after_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCascadeSection:
    """A served model without instances: others answer for it."""

    cascade: ServeCascade
    classes: tuple[str, ...] = ()
    """Request classes that it serves, interactive ones; default: all that both of its models serve."""
    default_class: str = ""
    """Class of a request that does not say; default: the first of them."""
    aliases: tuple[str, ...] = ()
    """Other names that clients may use for it."""


def is_cascade(entry: object) -> bool:
    return isinstance(entry, Mapping) and "cascade" in entry


def read_cascade(entry: object, path: str) -> ServeCascadeSection:
    if isinstance(entry, Mapping) and "engine" in entry:
        raise ConfigError(f"{path}: has a cascade and an engine; other models answer for a cascade: remove one of them")
    return read_record(ServeCascadeSection, entry, path)


def cascade_settings(
    name: str,
    section: ServeCascadeSection,
    models: Sequence[ModelSettings],
    classes: Mapping[str, RequestClass],
    path: str,
) -> ModelSettings:
    """``models``: those with instances, of which two answer for it."""
    said, by_name = section.cascade, {model.name: model for model in models}
    for key, part in (("first", said.first), ("then", said.then)):
        if part not in by_name:
            raise ConfigError(
                f"{path}.cascade.{key}: {part!r} must be a model with instances; {suggest(part, by_name)}"
            )
    if said.first == said.then:
        raise ConfigError(f"{path}.cascade.then: {said.then!r} is the first model, too; name another one")
    both = [each for each in by_name[said.first].classes if each in by_name[said.then].classes]
    fitting = [each for each in both if classes[each].kind == "interactive"]
    for i, each in enumerate(section.classes):
        if each not in fitting:
            raise ConfigError(
                f"{path}.classes[{i}]: {each!r} must be an interactive class of {said.first!r} and {said.then!r}; "
                + suggest(each, fitting)
            )
    served = section.classes or tuple(fitting)
    if not served:
        raise ConfigError(f"{path}.cascade: {said.first!r} and {said.then!r} have no interactive class in common")
    if section.default_class and section.default_class not in served:
        raise ConfigError(f"{path}.default_class: {section.default_class!r}; {suggest(section.default_class, served)}")
    own = by_name[said.first].default_class
    return ModelSettings(
        name=name,
        kinds=(),
        classes=served,
        default_class=section.default_class or (own if own in served else served[0]),
        batch_class="",
        aliases=section.aliases,
        cascade=CascadeSettings(first=said.first, then=said.then, rule=said.rule(), first_wait_s=said.first_wait_s),
    )
