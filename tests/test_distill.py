"""Facts of the distillation losses, on tiny encoders of three families."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import kl_div

from midstream import zoo
from midstream.train.distill import (
    confidence,
    gradient_loss,
    gradients,
    patience_loss,
    soft_label_loss,
    trace,
)


def tiny(family: str, attention: str = "eager") -> nn.Module:
    """A tiny random classifier with three classes, gradients on, dropout off."""
    if family == "distilbert":
        config = hf.DistilBertConfig(dim=32, n_heads=4, hidden_dim=64, n_layers=4, vocab_size=128)
    else:
        config = zoo.load(f"tiny:{family}").model.config
    config.num_labels = 3
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # the usual initialisation answers every input alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(params=("bert", "roberta", "distilbert"))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny(request.param)


def padded(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sentences of 9 and 6 tokens."""
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_the_traced_gradient_is_that_of_the_embedding_output(model: nn.Module) -> None:
    inputs = padded()
    (gradient,) = gradients(trace(model, inputs))
    hidden = model(**inputs, output_hidden_states=True)
    first = hidden.hidden_states[0]
    (plain,) = torch.autograd.grad(hidden.logits.softmax(-1).max(-1).values.sum(), first)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-7)


def test_traced_states_and_their_gradients_are_the_models_hidden_states(model: nn.Module) -> None:
    inputs = padded()
    traced = trace(model, inputs, layers=[0, 2])
    out = model(**inputs, output_hidden_states=True)
    for state, hidden in zip(traced.states, (out.hidden_states[1], out.hidden_states[3]), strict=True):
        torch.testing.assert_close(state, hidden)
    plain = torch.autograd.grad(confidence(out.logits), [out.hidden_states[1], out.hidden_states[3]])
    torch.testing.assert_close(gradients(traced)[1:], plain, rtol=1e-4, atol=1e-7)


def test_the_sum_over_a_batch_gives_every_samples_own_gradient(model: nn.Module) -> None:
    inputs = padded()
    (together,) = gradients(trace(model, inputs))
    for row, length in ((0, 9), (1, 6)):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        (gradient,) = gradients(trace(model, alone))
        torch.testing.assert_close(together[row : row + 1, :length], gradient, rtol=1e-3, atol=1e-6)


def test_padding_has_no_gradient(model: nn.Module) -> None:
    (gradient,) = gradients(trace(model, padded()))
    assert (gradient[1, 6:] == 0).all()
    assert (gradient[1, :6].norm(dim=-1) > 0).all()


def test_nothing_below_the_first_block_is_trained(model: nn.Module) -> None:
    confidence(trace(model, padded()).logits).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any("embeddings" in name for name in trained)
    assert any("layer.0." in name for name in trained)


def test_equal_models_have_a_gradient_loss_of_zero(model: nn.Module) -> None:
    (gradient,) = gradients(trace(model, padded()))
    assert gradient_loss(gradient, gradient) == 0


def test_scaled_gradients_have_loss_zero_opposite_ones_four_and_orthogonal_ones_two() -> None:
    gradient = torch.randn(3, 5, 8)
    assert gradient_loss(7.0 * gradient, gradient).item() == pytest.approx(0, abs=1e-5)
    assert gradient_loss(-0.2 * gradient, gradient).item() == pytest.approx(4, rel=1e-5)
    turned = torch.stack([-gradient[..., 1], gradient[..., 0]], -1)
    assert gradient_loss(turned, gradient[..., :2]).item() == pytest.approx(2, rel=1e-5)


def test_padding_neither_adds_to_the_gradient_loss_nor_dilutes_it() -> None:
    ours, theirs = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    blank = torch.zeros(2, 3, 8)
    longer = gradient_loss(torch.cat([ours, torch.randn(2, 3, 8)], 1), torch.cat([theirs, blank], 1))
    torch.testing.assert_close(longer, gradient_loss(ours, theirs))


def test_the_gradient_loss_trains_the_model_only_with_create_graph(model: nn.Module) -> None:
    target = torch.randn(2, 9, 32)
    (constant,) = gradients(trace(model, padded()))
    assert not gradient_loss(constant, target).requires_grad
    (alive,) = gradients(trace(model, padded()), create_graph=True)
    gradient_loss(alive, target).backward()
    weights = dict(model.named_parameters())
    reached = next(weight for name, weight in weights.items() if "layer.1." in name and "ffn" not in name)
    assert reached.grad is not None
    assert reached.grad.abs().max() > 0
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in weights.values())


def test_a_small_step_down_the_gradient_loss_lowers_it(model: nn.Module) -> None:
    (target,) = gradients(trace(tiny("bert"), padded(seed=1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    losses = []
    for _ in range(3):
        (gradient,) = gradients(trace(model, padded()), create_graph=True)
        losses.append(gradient_loss(gradient, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_the_second_derivative_is_right_to_double_precision() -> None:
    """A bert's gradient loss as a function of one weight matrix, against finite differences."""
    model = tiny("bert").double()
    weight = model.classifier.weight
    inputs, target = padded(), torch.randn(2, 9, 32, dtype=torch.double)

    def loss(value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            original = weight.clone()
        del model.classifier.weight
        model.classifier.weight = value
        (gradient,) = gradients(trace(model, inputs), create_graph=True)
        model.classifier.weight = nn.Parameter(original)
        return gradient_loss(gradient, target)

    assert torch.autograd.gradcheck(loss, (weight.detach().clone().requires_grad_(),))


def test_fused_attention_has_no_second_derivative() -> None:
    model = tiny("bert", attention="sdpa")
    inputs = padded()
    (gradient,) = gradients(trace(model, inputs), create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient_loss(gradient, torch.randn(2, 9, 32)).backward()


def test_soft_labels_are_divided_by_samples_and_not_by_classes() -> None:
    ours, theirs = torch.randn(4, 2), torch.randn(4, 2)
    loops = 0.0
    for student, teacher in zip(ours / 5, theirs / 5, strict=True):
        p, q = teacher.softmax(0), student.softmax(0)
        loops += 25 * float((p * (p / q).log()).sum()) / 4
    assert soft_label_loss(ours, theirs, 5.0).item() == pytest.approx(loops, rel=1e-4)
    mean = 25 * kl_div((ours / 5).log_softmax(-1), (theirs / 5).softmax(-1), reduction="none").mean()
    assert soft_label_loss(ours, theirs, 5.0).item() == pytest.approx(2 * mean.item(), rel=1e-4)


def test_soft_labels_of_equal_logits_cost_nothing_whatever_their_offset() -> None:
    logits = torch.randn(4, 3)
    assert soft_label_loss(logits + 2, logits, 5.0).item() == pytest.approx(0, abs=1e-5)


def test_patience_ignores_the_length_of_states() -> None:
    states = torch.randn(4, 2, 8)
    assert patience_loss(3 * states, states).item() == pytest.approx(0, abs=1e-9)
    assert patience_loss(-states, states).item() == pytest.approx(4 / 8, rel=1e-5)
