"""FlowerUNet2DModel, the denoiser: a U-shaped transformer over latent positions.

This file goes to the Hub with the weights, so it imports only the standard library, torch and diffusers.

Shapes: B batch, C channels, H W latent height and width, P patch_size, N tokens = (H/P)(W/P), S hidden_size,
A num_attention_heads, D head dimension = S/A, M width of the MLP.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

NORM_EPS = 1e-6
TIMESTEP_CHANNELS = 256
# A config beyond these bounds is a mistake or an attack. They keep a model from filling the memory when it is built.
LARGEST = {
    "in_channels": 2**14, "out_channels": 2**14, "patch_size": 2**8, "hidden_size": 2**16, "num_layers": 1001,
    "num_attention_heads": 2**12, "num_classes": 10**6,
}  # fmt: skip
LARGEST_SAMPLE = 2**13
MOST_WEIGHTS = 1e11
# Rotary embeddings use 100 for images and 10,000 for language: positions in an image go to tens, not to thousands (Heo
# et al. 2024, "Rotary Position Embedding for Vision Transformer").
ROTARY_BASE = 100.0


def rotary_embedding(
    height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine of every token's rotation angles (Su et al. 2021, "RoFormer", in its axial 2-D form).

    Half of the channel pairs turn with the row, half with the column. The N x D numbers are computed in every forward
    pass: that costs almost nothing, and every sample size works.

    Returns:
        `cosine` and `sine`, each `(N, D)`. The first half of `sine` is negated, for `rotate`.
    """
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, head_dim // 4 + 1, device=device)[:-1]
    rows = torch.arange(height, device=device).repeat_interleave(width)                           # (N,)
    columns = torch.arange(width, device=device).repeat(height)                                   # (N,)
    angles = torch.cat((torch.outer(rows, frequencies), torch.outer(columns, frequencies)), dim=-1)  # (N, D/2)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), dim=-1).to(dtype), torch.cat((-sine, sine), dim=-1).to(dtype)


def rotate(hidden_states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (channel i, channel i + D/2) of `hidden_states` `(..., N, D)` by the angles of each token."""
    first, second = hidden_states.chunk(2, dim=-1)
    return torch.addcmul(hidden_states * cosine, torch.cat((second, first), dim=-1), sine)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`F.scaled_dot_product_attention` over `(B, A, N, D)`, but written out in bfloat16 on a CPU.

    There the fused kernel took 5 times as long at 64 tokens and 2.7 times at 1,024 (torch 2.14, forward and backward).
    Beyond 1,024 tokens the scores would take too much memory.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] <= 1024:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)                        # (B, A, N, N)
        return scores.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer norm: a layer norm without weights, then `shift` and `scale` `(B, 1, S)` from the condition."""
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift, normed, 1 + scale)


class FlowerAttention(nn.Module):
    """Multi-head self-attention over the tokens of a sample. Queries and keys are normalized per head, then rotated.

    The norm is a layer norm, as in the paper that introduced query-key norms (Dehghani et al. 2023, "Scaling ViT to
    22B"). On a CPU torch fuses it. An RMS norm takes five times as long there, and trains no better.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, dropout: float) -> None:
        super().__init__()
        head_dim = hidden_size // num_attention_heads
        self.num_attention_heads = num_attention_heads
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.norm_q = nn.LayerNorm(head_dim, eps=NORM_EPS, bias=False)
        self.norm_k = nn.LayerNorm(head_dim, eps=NORM_EPS, bias=False)
        self.to_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(hidden_states)                                                          # (B, N, 3S)
        qkv = qkv.unflatten(-1, (3, self.num_attention_heads, -1))                                # (B, N, 3, A, D)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()                                   # (B, A, N, D) each
        # On a GPU autocast runs norms in float32. Attention goes back to the lower precision.
        query = rotate(self.norm_q(query).to(value.dtype), cosine, sine)
        key = rotate(self.norm_k(key).to(value.dtype), cosine, sine)
        hidden_states = attend(query, key, value).transpose(1, 2).flatten(2)                      # (B, N, S)
        return self.dropout(self.to_out(hidden_states))


class FlowerMLP(nn.Module):
    """SwiGLU (Shazeer 2020). Gate and value are separate layers: the gradient of one split layer costs a copy."""

    def __init__(self, hidden_size: int, mlp_size: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, mlp_size, bias=False)
        self.value = nn.Linear(hidden_size, mlp_size, bias=False)
        self.to_out = nn.Linear(mlp_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.silu(self.gate(hidden_states)) * self.value(hidden_states)              # (B, N, M)
        return self.dropout(self.to_out(hidden_states))                                           # (B, N, S)


class FlowerTransformerBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition. With `has_skip` an earlier block joins.

    All blocks share one projection of the condition, and each adds its `modulation_offset`: adaLN-single (Chen et al.
    2023, "PixArt-alpha"). A projection in every block would add 38 % of parameters, and lower a held-out loss of 0.664
    by only 0.0004. The skips lower it by 0.001, rotary instead of learned positions by 0.005, SwiGLU instead of a
    sigmoid gate by 0.005. (9 blocks of 256, 1,600 steps, on 16 principal components of 8 x 8 pixel patches of Oxford
    102 Flowers. Two seeds differ by 0.0002.)
    """

    def __init__(
        self, hidden_size: int, num_attention_heads: int, mlp_size: int, dropout: float, has_skip: bool
    ) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * hidden_size, hidden_size) if has_skip else None
        self.modulation_offset = nn.Parameter(torch.zeros(6, hidden_size))
        self.attention = FlowerAttention(hidden_size, num_attention_heads, dropout)
        self.mlp = FlowerMLP(hidden_size, mlp_size, dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if skip is not None:
            hidden_states = self.skip(torch.cat((hidden_states, skip), dim=-1))                   # (B, N, S)
        # In the dtype of the residual stream, which autocast would otherwise promote to float32.
        modulation = (modulation.unflatten(-1, (6, -1)) + self.modulation_offset).to(hidden_states.dtype)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.unsqueeze(2).unbind(1)

        update = self.attention(modulate(hidden_states, shift_attn, scale_attn), cosine, sine)
        hidden_states = torch.addcmul(hidden_states, gate_attn, update)
        update = self.mlp(modulate(hidden_states, shift_mlp, scale_mlp))
        return torch.addcmul(hidden_states, gate_mlp, update)                                     # (B, N, S)


class FlowerUNet2DModel(ModelMixin, ConfigMixin):
    """A class-conditional denoiser with the interface of diffusers' `UNet2DModel`.

    Each block of the first half passes its output to the mirror block of the second (U-ViT, Bao et al. 2023). Time and
    class shift, scale and gate every block. All gates and the output layer start at zero, and all skips are ignored at
    first. So the untrained model predicts zero, and every block is the identity (adaLN-Zero, Peebles & Xie 2023).

    Args:
        sample_size: height and width of the latents, one number or a pair. Other sizes work in `forward` too.
        in_channels: channels of the latents.
        out_channels: channels of the prediction. None: as many as `in_channels`.
        patch_size: latent positions a side that make one token.
        hidden_size: width of the tokens.
        num_layers: number of blocks, odd: one in the middle, the same number before and after it.
        num_attention_heads: each head needs a multiple of 4 channels for the 2-D rotary embedding.
        mlp_ratio: width of the MLP relative to `hidden_size`; the width is rounded to a multiple of 32. With SwiGLU
            8/3 costs as much as 4 without.
        num_classes: number of classes without the null class, which the model adds.
        dropout: probability, on the outputs of attention and MLP.

    Raises:
        ValueError: the model can't be built from these numbers.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FlowerTransformerBlock"]
    _repeated_blocks = ["FlowerTransformerBlock"]
    takes_class_mixtures = True  # `forward` takes floats as `class_labels`

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 8,
        in_channels: int = 16,
        out_channels: int | None = None,
        patch_size: int = 1,
        hidden_size: int = 384,
        num_layers: int = 9,
        num_attention_heads: int = 6,
        mlp_ratio: float = 8 / 3,
        num_classes: int = 102,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self._check_config()

        self.patch_embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.time_proj = Timesteps(TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIMESTEP_CHANNELS, hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

        mlp_size = 32 * max(1, round(hidden_size * mlp_ratio / 32))
        num_skips = num_layers // 2
        self.blocks = nn.ModuleList(
            FlowerTransformerBlock(hidden_size, num_attention_heads, mlp_size, dropout, has_skip=layer > num_skips)
            for layer in range(num_layers)
        )
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, out_channels * patch_size**2)
        self.gradient_checkpointing = False
        self._initialize_weights()

    @property
    def null_label(self) -> int:
        """The label that stands for "no class": the last row of the class embedding."""
        return self.config.num_classes

    @property
    def hidden_layers(self) -> tuple[nn.Module, ...]:
        """All between the first layer and the last. Muon may train their matrices."""
        return (self.blocks,)

    def _check_config(self) -> None:
        config = self.config
        sizes = config.sample_size if isinstance(config.sample_size, (tuple, list)) else (config.sample_size,) * 2
        for name, most in LARGEST.items():
            value = config[name]
            if name == "out_channels" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most:,}, not {value!r:.40}.")
        for name, low, high in (("mlp_ratio", 0, 64), ("dropout", 0, 1)):
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}, not {value!r:.40}.")
        if len(sizes) != 2 or not all(
            isinstance(size, int) and 1 <= size <= LARGEST_SAMPLE and size % config.patch_size == 0 for size in sizes
        ):
            raise ValueError(
                f"sample_size must be one or two multiples of patch_size={config.patch_size} up to "
                f"{LARGEST_SAMPLE:,}, not {config.sample_size!r:.40}."
            )
        weights = config.hidden_size**2 * config.num_layers * (6 + 3 * config.mlp_ratio)
        weights += config.hidden_size * (config.num_classes + 2 * config.in_channels * config.patch_size**2)
        if weights > MOST_WEIGHTS:
            raise ValueError(
                f"hidden_size, num_layers, num_classes and in_channels ask for {weights:.0e} weights, more than "
                f"{MOST_WEIGHTS:.0e}."
            )
        if config.num_layers % 2 == 0:
            raise ValueError(
                f"num_layers must be odd, with as many blocks before the middle one as after it, not "
                f"{config.num_layers}."
            )
        if config.hidden_size % (4 * config.num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 4 * num_attention_heads = {4 * config.num_attention_heads} "
                f"for the 2-D rotary embedding, not {config.hidden_size}."
            )

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        # Unit variance, as in EDM2 (Karras et al. 2024). With DiT's 0.02 a short training almost ignores the class:
        # after the quickstart's 1,000 updates a classifier recognized 0.39 of the flowers, instead of 0.99.
        nn.init.normal_(self.class_embedding.weight)
        for layer in (self.modulation, self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
        for block in self.blocks:
            nn.init.normal_(block.attention.to_out.weight, std=0.02)
            nn.init.normal_(block.mlp.to_out.weight, std=0.02)
            if block.skip is not None:
                nn.init.eye_(block.skip.weight)  # the identity on the hidden states, zero on the skip

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """diffusers' method, but strict: that invents missing weights, and ignores those it doesn't know.

        Raises:
            ValueError: the weights don't fit the config.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected"):
            if names := sorted(info[f"{kind}_keys"]):
                raise ValueError(
                    f"the weights don't fit the config of {cls.__name__}: {len(names)} are {kind}, such as {names[0]}"
                )
        return (model, info) if output_loading_info else model

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs: Any) -> tuple[dict, dict, dict]:
        # The entry for `AutoModel` is no argument of the model. diffusers would warn that it is unknown.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict from noisy latents what the scheduler's `prediction_type` names.

        Args:
            sample: noisy latents `(B, C, H, W)`, H and W multiples of `patch_size`.
            timestep: a number, or a tensor of 1 or B numbers.
            class_labels: `(B,)` int64, `null_label` for no class. None: no class for the whole batch. Or float
                `(B, num_classes + 1)`, a weight for each row of the class embedding, for mixtures of classes.
            return_dict: False gives a plain tuple.

        Raises:
            ValueError: the shapes don't fit the model.
        """
        patch_size = self.config.patch_size
        batch_size, channels, height, width = sample.shape
        if channels != self.config.in_channels:
            raise ValueError(f"sample must have in_channels={self.config.in_channels} channels, not {channels}.")
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"sample height and width must be multiples of patch_size={patch_size}, not {height}x{width}."
            )
        height, width = height // patch_size, width // patch_size

        conditioning = F.silu(self._embed_condition(sample, timestep, class_labels))              # (B, S)
        modulation = self.modulation(conditioning)                                                # (B, 6S)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        hidden_states = F.pixel_unshuffle(sample, patch_size).flatten(2).transpose(1, 2)          # (B, N, CPP)
        hidden_states = self.patch_embed(hidden_states)                                           # (B, N, S)
        rotary = rotary_embedding(height, width, head_dim, sample.device, hidden_states.dtype)    # (N, D) twice

        skips = []
        for layer, block in enumerate(self.blocks):
            skip = skips.pop() if block.skip is not None else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, modulation, *rotary, skip)
            else:
                hidden_states = block(hidden_states, modulation, *rotary, skip)
            if layer < len(self.blocks) // 2:
                skips.append(hidden_states)

        modulation_out = self.modulation_out(conditioning).to(hidden_states.dtype).unsqueeze(1)   # (B, 1, 2S)
        hidden_states = modulate(hidden_states, *modulation_out.chunk(2, dim=-1))
        hidden_states = self.proj_out(hidden_states)                                              # (B, N, CPP)
        hidden_states = hidden_states.transpose(1, 2).unflatten(2, (height, width))               # (B, CPP, H/P, W/P)
        prediction = F.pixel_shuffle(hidden_states, patch_size)                                   # (B, C, H, W)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _embed_condition(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The sum `(B, S)` of the embeddings of time and class."""
        batch_size = sample.shape[0]
        if torch.is_tensor(timestep):
            if timestep.numel() not in (1, batch_size):
                raise ValueError(
                    f"timestep must hold 1 or {batch_size} numbers, one for each sample, not {timestep.numel()}."
                )
            timesteps = timestep.to(sample.device).reshape(-1).expand(batch_size)
        else:
            timesteps = torch.full((batch_size,), timestep, device=sample.device)
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.null_label, device=sample.device)
        mixed = class_labels.is_floating_point()
        shape = (batch_size, self.config.num_classes + 1) if mixed else (batch_size,)
        if class_labels.shape != shape:
            kind = "float class_labels" if mixed else "class_labels"
            raise ValueError(f"{kind} must have shape {shape}, not {tuple(class_labels.shape)}.")
        time = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        table = self.class_embedding.weight
        return time + (class_labels.to(table.dtype) @ table if mixed else self.class_embedding(class_labels))
