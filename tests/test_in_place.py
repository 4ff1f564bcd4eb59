"""Gradients of the input embedding go to the rows of `.grad` that they belong to, and are autograd's own."""

from typing import Any

import pytest
import torch
from test_forward import PROMPT_LENS, SAMPLES, TOKENIZER, in_training
from tiny import make_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fourscore.models.forward import completion_logprobs, completion_values, rectangle
from fourscore.models.in_place import embedding_gradient_in_place


class Tables(TorchDispatchMode):
    """Counts gradients of a whole table."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.embedding_dense_backward.default
        return function(*args, **(kwargs or {}))


class Model(nn.Module):
    """An embedding, and nothing else."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, **options).double()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


def gradient_of(model: Model, ids: Tensor, factors: Tensor) -> tuple[Tensor, int]:
    """Of two passes, and how many tables autograd made."""
    model.embedding.weight.grad = None
    with Tables() as tables:
        for factor in (1, 10):
            (model.embedding(ids) * factors * factor).sum().backward()
    return model.embedding.weight.grad, tables.count


def test_rows_by_hand() -> None:
    model, ids = Model(padding_idx=1), torch.tensor([[4, 0, 4], [1, 0, 3]])
    factors = torch.tensor([[1.0, 2, 4], [8, 16, 32]], dtype=torch.float64)[..., None].expand(2, 3, 3)
    # Twice, and ten times the second time; the padding token's row has none.
    wanted = 11 * torch.tensor([18.0, 0, 0, 32, 5], dtype=torch.float64)[:, None].expand(5, 3)
    with embedding_gradient_in_place(model):
        got, tables = gradient_of(model, ids, factors)
    assert_close(got, wanted)
    assert tables == 0
    own, tables = gradient_of(model, ids, factors)
    assert_close(own, wanted)
    assert tables == 2, "and autograd's own are back"


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}], ids=str)
def test_other_embeddings_are_left_alone(options: dict[str, Any]) -> None:
    model = Model(**options)
    with embedding_gradient_in_place(model):
        assert "forward" not in vars(model.embedding)
    model = Model()
    with torch.no_grad(), embedding_gradient_in_place(model):
        assert "forward" not in vars(model.embedding)
    model.embedding.weight.requires_grad_(False)
    with embedding_gradient_in_place(model):
        assert not model.embedding(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("role", ["policy", "reward"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_passes_make_no_gradient_of_the_whole_table(arch: str, role: Any) -> None:
    model: Any = in_training(make_model(arch, TOKENIZER, role))
    batch = rectangle(SAMPLES, PROMPT_LENS)
    weight = model.get_input_embeddings().weight
    gradients = []
    for _ in range(2):
        with Tables() as tables:
            out = completion_logprobs(model, batch, 1.0)[0] if role == "policy" else completion_values(model, batch)
            out.sum().backward()
        # GPT-2's other embedding is that of positions.
        assert tables.count == (arch == "gpt2")
        gradients.append((weight.grad.data_ptr(), weight.grad.clone()))
    assert gradients[0][0] == gradients[1][0]
    assert_close(gradients[1][1], 2 * gradients[0][1], rtol=1e-4, atol=1e-5)
    met = torch.unique(torch.cat(SAMPLES))
    assert (gradients[0][1][met].abs().amax(1) > 0).any()
