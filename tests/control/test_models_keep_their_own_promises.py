"""Classes are shared by all models; what one model was promised must not bind another."""

from __future__ import annotations

from chiron.control.model import ModelState, local_view
from chiron.core.types import Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.policies.registry import make_policy

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.2)
VOICE = RequestClass(name="voice", kind="interactive", ttft_s=1.0, itl_s=0.03)
KIND = InstanceKind(
    name="a100", gpu="A100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=1024
)


def itl_slo_s(*arrived: RequestClass) -> float:
    """The ITL SLO of an idle mixed instance of a model that has had requests of these classes."""
    state = ModelState(ModelSpec(name="m", kinds=(KIND,)), (CHAT, VOICE), make_policy("chiron"))
    for number, cls in enumerate(arrived):
        state.learner.ran(Request(number, "m", cls, 0.0, 100))
    view = local_view(state, Instance(1, "m", KIND, "mixed", 0.0), 10.0)
    assert set(view.mixes) == {c.name for c in arrived or (CHAT, VOICE)}
    return view.itl_slo_s


def test_a_model_that_never_serves_a_tight_class_is_not_held_to_it() -> None:
    assert itl_slo_s(CHAT) == 0.2


def test_every_class_that_it_has_served_binds() -> None:
    assert itl_slo_s(CHAT, VOICE) == 0.03


def test_before_the_first_request_the_tightest_promise_holds() -> None:
    assert itl_slo_s() == 0.03
