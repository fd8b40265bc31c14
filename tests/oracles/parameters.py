"""Heads read from parameters, with every matrix multiplied out, in float64."""

import torch


def composition(a, b):
    """||AB|| / (||A|| ||B||) of whole matrices."""
    return float(torch.linalg.norm(a @ b) / (torch.linalg.norm(a) * torch.linalg.norm(b)))


def component_scores(a, b, rank):
    """||v_c B|| / ||B|| of the first right singular vectors of A."""
    v = torch.linalg.svd(a)[2][:rank]
    return torch.stack([torch.linalg.norm(row @ b) / torch.linalg.norm(b) for row in v])


def llama_head(model, layer, head):
    """W_QK and W_OV [dim, dim] of a Llama, the gain of the norm written out; rows are vectors."""
    block = model.model.layers[layer]
    attention, config = block.self_attn, model.config
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    gain = torch.diag(block.input_layernorm.weight.detach().double())
    mine, shared = slice(head * width, (head + 1) * width), slice(head // group * width, (head // group + 1) * width)
    q, k, v, o = (getattr(attention, f"{n}_proj").weight.detach().double() for n in "qkvo")
    return gain @ q[mine].T @ k[shared] @ gain, gain @ v[shared].T @ o[:, mine].T


def outlier_columns(w):
    """Largest over mean absolute value, column by column."""
    mean = sum(abs(float(x)) for row in w for x in row) / w.numel()
    return torch.tensor([max(abs(float(x)) for x in w[:, c]) / mean for c in range(w.shape[1])])
