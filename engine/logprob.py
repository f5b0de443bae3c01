"""Log-probabilities of given tokens under a frozen `lm_head`, without ever holding a batch's logits.

With a vocabulary of 248k and 12k tokens the float32 logits of one micro-batch are 12 GB, and autograd keeps
several copies. `token_logprobs` walks over blocks of [tokens, vocabulary] instead and keeps one float32 number
a token (the log of the partition function); the backward computes each block again.

    log p(t | h) = (h . w_t) / T - log sum_j exp((h . w_j) / T)
    d log p / dh = (w_t - sum_j p_j w_j) / T                            (the gradient of log-softmax)

The running maximum and sum over vocabulary blocks are those of online softmax (Milakov & Gimelshein 2018,
arXiv 1805.02867). `micro_batches` decides which sequences go through the model together.
"""

import math

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # logits held at a time: 64 MiB of float32
BLOCK_ELEMENTS_CUDA = 2**27  # 512 MiB: small products leave most of a card idle
VOCAB_BLOCK = 2**14  # rows of lm_head held in float32 at a time: 128 MiB at hidden 2,048


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    vocab: int | None = None,
) -> Tensor:
    """log_softmax(hidden @ weight.T / temperature) at `targets`, differentiable in `hidden` alone.

    hidden [N, D] of any float type; weight [V, D], frozen; targets [N] int64. Returns [N], float32 (float64 for
    float64 hidden). `vocab`: ids from there on are padding rows of the embedding; they get no mass, as in the
    samplers. `chunk`: tokens a block, chosen from BLOCK_ELEMENTS by default. Raises ValueError on a target
    outside the vocabulary, a temperature that is not positive, or a weight that expects a gradient.
    """
    weight = weight if vocab is None else weight[:vocab]
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if weight.requires_grad:
        raise ValueError("token_logprobs gives the lm_head no gradient: freeze it")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(f"a target id lies outside the vocabulary of {len(weight)}")
    elements = BLOCK_ELEMENTS_CUDA if hidden.is_cuda else BLOCK_ELEMENTS
    chunk = chunk or max(1, elements // min(len(weight), VOCAB_BLOCK))
    return _TokenLogprobs.apply(hidden, weight, targets, float(temperature), chunk)


def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths`, grouped so that a group padded to its longest holds at most `max_tokens` tokens.

    Longest first (ties in the given order): little padding, and a card too small shows at the first group. A
    sequence longer than `max_tokens` gets a group of its own. Raises ValueError unless max_tokens is positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, not {max_tokens}")
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def consecutive(costs: list[int], budget: int) -> list[list[int]]:
    """Groups of consecutive indices whose costs add up to at most `budget` (one index at least)."""
    groups: list[list[int]] = []
    total = math.inf
    for i, cost in enumerate(costs):
        if total + cost > budget:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += cost
    return groups


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        ctx.temperature, ctx.chunk = temperature, chunk
        if len(targets) <= chunk and len(weight) <= VOCAB_BLOCK:  # one block: keep it, computing it twice is slower
            logp = torch.log_softmax(_logits(hidden, _operand(weight, hidden), temperature), dim=-1)
            ctx.save_for_backward(hidden, weight, targets, None, logp)
            return logp.gather(1, targets[:, None])[:, 0]
        chosen, log_z = _forward_blocks(hidden, weight, targets, temperature, chunk)
        ctx.save_for_backward(hidden, weight, targets, log_z, None)
        return chosen - log_z

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, log_z, logp = ctx.saved_tensors
        scale = (grad / ctx.temperature)[:, None]
        if logp is not None:
            minus_p = logp.exp().neg_()
            minus_p[torch.arange(len(targets), device=targets.device), targets] += 1
            grad_hidden = _matmul(minus_p.mul_(scale), _operand(weight, hidden))
        else:
            grad_hidden = _backward_blocks(hidden, weight, targets, log_z, scale, ctx.temperature, ctx.chunk)
        return grad_hidden.to(hidden.dtype), None, None, None, None


def _forward_blocks(hidden, weight, targets, temperature, chunk) -> tuple[Tensor, Tensor]:
    """The target's logit and the log of the partition function, both [N], vocabulary block by vocabulary block.

    The vocabulary is the outer loop, so that each block of the weight is converted to float32 once.
    """
    chosen = torch.zeros(len(targets), dtype=_dtype(hidden), device=hidden.device)
    log_z = torch.full_like(chosen, -torch.inf)
    for start, block in _vocab_blocks(weight, hidden):
        for rows in _chunks(len(targets), chunk):
            logits = _logits(hidden[rows], block, temperature)
            inside, local = _inside(targets[rows], start, len(block))
            chosen[rows] += torch.where(inside, logits.gather(1, local[:, None])[:, 0], 0)
            top = logits.amax(dim=-1)
            block_z = logits.sub_(top[:, None]).exp_().sum(dim=-1).log_().add_(top)
            log_z[rows] = torch.logaddexp(log_z[rows], block_z)
    return chosen, log_z


def _backward_blocks(hidden, weight, targets, log_z, scale, temperature, chunk) -> Tensor:
    """Gradient to `hidden` [N, D]: scale * (w_target - sum_j p_j w_j), scale [N, 1] = incoming gradient / T."""
    grad = torch.zeros(hidden.shape, dtype=_dtype(hidden), device=hidden.device)
    for start, block in _vocab_blocks(weight, hidden):
        for rows in _chunks(len(targets), chunk):
            minus_p = _logits(hidden[rows], block, temperature).sub_(log_z[rows, None]).exp_().neg_()
            inside, local = _inside(targets[rows], start, len(block))
            minus_p.scatter_add_(1, local[:, None], inside[:, None].to(minus_p.dtype))
            grad[rows] += _matmul(minus_p.mul_(scale[rows]), block)
    return grad


def _dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _operand(weight: Tensor, hidden: Tensor) -> Tensor:
    """The weight in the type that the products are taken in: on CUDA bf16 stays, see `_matmul`."""
    return weight if _mixed(weight) else weight.to(_dtype(hidden))


def _mixed(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32. On CUDA, half-width operands are multiplied by tensor cores that add in float32."""
    if _mixed(right):
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    return left @ right


def _logits(hidden: Tensor, block: Tensor, temperature: float) -> Tensor:
    if not _mixed(block):
        hidden = hidden.to(block.dtype)
    return _matmul(hidden, block.T).div_(temperature)


def _vocab_blocks(weight: Tensor, hidden: Tensor):
    for start in range(0, len(weight), VOCAB_BLOCK):
        yield start, _operand(weight[start : start + VOCAB_BLOCK], hidden)


def _chunks(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def _inside(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the block [start, start + size), and their column in it (0 for the others)."""
    inside = (targets >= start) & (targets < start + size)
    return inside, torch.where(inside, targets - start, 0)
