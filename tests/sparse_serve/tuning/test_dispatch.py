"""A plan is its text, and serves every number of tokens by the kernel its text names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import LinearSpec, supported
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning.dispatch import Plan, Step
from sparse_serve.tuning.samples import random_weight

SPEC = LinearSpec(48, 64, NMPattern(2, 4), torch.float32, "cpu")
BOTH = Plan((Step(4, "reference"), Step(None, "cpu")))

bounds = st.lists(st.integers(1, 10**6), unique=True, max_size=5).map(sorted)
kernel_names = st.sampled_from(["cpu", "reference", "skinny"])


@given(bounds, st.data())
def test_the_text_is_the_plan(tokens: list[int], data: st.DataObject) -> None:
    plan = Plan(tuple(Step(bound, data.draw(kernel_names)) for bound in [*tokens, None]))
    assert Plan.parse(str(plan)) == plan
    for step in plan.steps[:-1]:
        assert step.tokens is not None
        assert plan.kernel_for(step.tokens) == step.kernel
    assert plan.kernel_for(10**7) == plan.steps[-1].kernel


@pytest.mark.parametrize(
    "text", ["", "cpu", "4=cpu", "*=cpu,4=cpu", "8=cpu,4=cpu,*=cpu", "-1=cpu,*=cpu", "x=cpu", "*="]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(KernelError, match="plan"):
        Plan.parse(text)


class Layer(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.bound, self.tensors = plan.bind(), plan.prepare(random_weight(SPEC))

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.bound.linear(x_TI, self.tensors, None, SPEC.out_features)


def need_cpu_kernel() -> None:
    kernels, refused = supported(SPEC)
    if "cpu" not in kernels:
        pytest.skip(refused["cpu"])


def test_each_number_of_tokens_goes_to_its_kernel() -> None:
    need_cpu_kernel()
    both, alone = Layer(BOTH), Layer(Plan.of("cpu"))
    assert {name.partition("__")[0] for name in both.tensors} == {"reference", "cpu"}
    both.tensors["reference__values"].neg_()  # so that it is seen which one ran
    x_TI = torch.randn(9, 64)
    assert torch.equal(both(x_TI), alone(x_TI))
    assert torch.equal(both(x_TI.reshape(3, 3, 64)), alone(x_TI).reshape(3, 3, 48))
    torch.testing.assert_close(both(x_TI[:4]), -alone(x_TI[:4]))


@pytest.mark.parametrize("plan", [BOTH, Plan.of("cpu"), Plan.of("reference")])
def test_one_compiled_graph_serves_every_number_of_tokens(plan: Plan) -> None:
    """`fullgraph`, as vLLM compiles; for the number of tokens it is compiled with and for others."""
    need_cpu_kernel()
    layer, compiled_for = Layer(plan), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled_for.append(inputs)
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for count in (11, 3, 9):  # the first must equal no other size, or torch takes them for the same
        x_TI = torch.randn(count, 64)
        assert torch.equal(compiled(x_TI), layer(x_TI))
    assert len(compiled_for) == 1
