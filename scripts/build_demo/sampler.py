"""A CPU sampler for Llama models: many rows after one shared prefix, a finished row replaced at once."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


class SharedPrefixSampler:
    """Samples continuations of ``prefix + opening`` for many openings, one token a row and step.

    The prefix's keys and values are computed once and shared by all rows, openings are fed token by token, and a
    row that ends is refilled with the next opening, so every step runs the full batch. Weights of one kind are
    fused (q, k, v; gate, up) and only `vocab` rows of the output embedding are multiplied.
    """

    def __init__(self, model: PreTrainedModel, vocab: Tensor, batch: int, max_tokens: int) -> None:
        self.config = model.config
        self.batch, self.max_tokens = batch, max_tokens
        body = model.model
        self.embed = body.embed_tokens.weight.detach()
        self.norm = body.norm.weight.detach()
        self.vocab = vocab
        self.head = _columns(model.lm_head.weight[vocab])
        self.rotary = body.rotary_emb
        self.layers = [
            (
                layer.input_layernorm.weight.detach(),
                _columns(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight),
                _columns(layer.self_attn.o_proj.weight),
                layer.post_attention_layernorm.weight.detach(),
                _columns(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight),
                _columns(layer.mlp.down_proj.weight),
            )
            for layer in body.layers
        ]
        self.model = model

    @torch.inference_mode()
    def sample(
        self,
        prefix: Sequence[int],
        openings: Sequence[Sequence[int]],
        stop: set[int],
        temperature: float,
        top_p: float,
        generator: torch.Generator,
    ) -> Iterator[tuple[int, list[int], bool]]:
        """Yields ``(index of the opening, tokens with the opening, whether a stop token ended it)`` as rows end."""
        config, batch, length = self.config, min(self.batch, len(openings)), self.max_tokens
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim, group = config.hidden_size // heads, heads // kv_heads
        out = self.model.model(torch.tensor([list(prefix)]), use_cache=True)
        shared = [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers]  # (kv, prefix, dim)
        start = len(prefix)
        cos, sin = self.rotary(self.embed[:1, None], torch.arange(start, start + length)[None])
        cos, sin = cos[0], sin[0]
        keys = [torch.zeros(batch, kv_heads, length, dim) for _ in self.layers]
        values = [torch.zeros(batch, kv_heads, length, dim) for _ in self.layers]
        rows = list(range(batch))
        row_of = torch.arange(batch)
        tokens = [list(openings[i]) for i in rows]
        position = torch.zeros(batch, dtype=torch.long)
        upcoming = batch
        slots = torch.arange(length)
        while rows:
            n = len(rows)
            current = torch.tensor([t[p] for t, p in zip(tokens, position.tolist(), strict=True)])
            x = self.embed[current]
            c, s = cos[position][:, None], sin[position][:, None]
            unseen = (slots[None] > position[:, None])[:, None, None]
            for (norm1, qkv, o, norm2, gate_up, down), (pk, pv), k_all, v_all in zip(
                self.layers, shared, keys, values, strict=True
            ):
                h = F.rms_norm(x, (x.shape[-1],), norm1, config.rms_norm_eps) @ qkv
                q, k, v = h.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
                q = _rotate(q.view(n, heads, dim), c, s)
                k_all[row_of, :, position] = _rotate(k.view(n, kv_heads, dim), c, s)
                v_all[row_of, :, position] = v.view(n, kv_heads, dim)
                q = q.view(n, kv_heads, group, dim) * dim**-0.5
                flat = q.transpose(0, 1).reshape(kv_heads, n * group, dim)
                before = torch.bmm(flat, pk.transpose(1, 2)).view(kv_heads, n, group, start).transpose(0, 1)
                own = torch.matmul(q, k_all[:n].transpose(2, 3)).masked_fill(unseen, float("-inf"))
                weights = torch.cat([before, own], dim=-1).softmax(-1)
                w = weights[..., :start].transpose(0, 1).reshape(kv_heads, n * group, start)
                y = torch.bmm(w, pv).view(kv_heads, n, group, dim).transpose(0, 1)
                y = y + torch.matmul(weights[..., start:], v_all[:n])
                x = x + y.reshape(n, heads * dim) @ o
                gate, up = (F.rms_norm(x, (x.shape[-1],), norm2, config.rms_norm_eps) @ gate_up).chunk(2, -1)
                x = x + F.silu(gate).mul_(up) @ down
            logits = F.rms_norm(x, (x.shape[-1],), self.norm, config.rms_norm_eps) @ self.head
            top, index = logits.topk(80, dim=-1)
            probs = (top / temperature).softmax(-1)
            probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0)
            choice = torch.multinomial(probs, 1, generator=generator)
            sampled = self.vocab[index.gather(1, choice)[:, 0]].tolist()
            position += 1
            dead = []
            for r in range(n):
                if int(position[r]) < len(tokens[r]):
                    continue
                ended = sampled[r] in stop
                if not ended:
                    tokens[r].append(sampled[r])
                if ended or len(tokens[r]) >= length:
                    yield rows[r], tokens[r], ended
                    if upcoming < len(openings):
                        rows[r], tokens[r] = upcoming, list(openings[upcoming])
                        position[r] = 0
                        upcoming += 1
                    else:
                        dead.append(r)
            if dead:
                keep = [r for r in range(n) if r not in set(dead)]
                rows, tokens = [rows[r] for r in keep], [tokens[r] for r in keep]
                position, row_of = position[keep], torch.arange(len(keep))
                keys = [k[keep] for k in keys]
                values = [v[keep] for v in values]


def _columns(*weights: Tensor) -> Tensor:
    """Fused (out, in) weights as one contiguous (in, out) matrix, the faster layout for small batches on a CPU."""
    return torch.cat([weight.detach() for weight in weights]).t().contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (row, head, dim) with (row, 1, dim) cosines and sines."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
