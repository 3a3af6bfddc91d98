"""DETR built from layers of torch and torchvision, with the weight names of its authors (Carion et al. 2020,
arXiv:2005.12872); it contains none of their code.

Shapes: B images; N = h w cells of the last feature map in row-major order; D = config.d_model; Q = config.num_queries.
"""

from typing import ClassVar

import torch
import torchvision
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from transformers import PreTrainedModel
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput, DetrSegmentationOutput

from ..models.configuration_detr import TfmDetrConfig
from ..models.positions import sine_2d

POSITIONS = 50  # rows and columns of learned positions


@strict
class AuthorsDetrConfig(TfmDetrConfig):
    """Configuration stored with the weights, which determine neither the number of heads nor the dilation."""

    model_type = "detr_authors"
    _auto_class = None
    auto_classes: ClassVar = {}


class AuthorsBackbone(nn.Module):
    """torchvision's ResNet with frozen batch norms."""

    def __init__(self, config: TfmDetrConfig):
        super().__init__()
        build = getattr(torchvision.models, config.backbone)
        dilation = [False, False, config.dilation]
        self.body = build(weights=None, norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=dilation)
        self.channels = [self.body.fc.in_features // 2**i for i in (3, 2, 1, 0)]
        self.body.fc = nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> four feature maps, the largest first."""
        body, maps = self.body, []
        states = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            states = stage(states)
            maps.append(states)
        return maps


class AuthorsPositions(nn.Module):
    """Learned positions, or sinusoidal ones without weights."""

    def __init__(self, config: TfmDetrConfig):
        super().__init__()
        self.width = config.d_model
        self.learned = config.position_embedding_type == "learned"
        if self.learned:
            self.row_embed = nn.Embedding(POSITIONS, config.d_model // 2)
            self.col_embed = nn.Embedding(POSITIONS, config.d_model // 2)

    def forward(self, mask: Tensor) -> Tensor:
        """Mask (B, h, w), True at image pixels -> (B, N, D)."""
        if not self.learned:
            return sine_2d(mask, self.width)
        B, h, w = mask.shape
        columns = self.col_embed.weight[None, :w].expand(h, -1, -1)
        rows = self.row_embed.weight[:h, None].expand(-1, w, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1).expand(B, -1, -1)


def before(norm: nn.LayerNorm, states: Tensor, norm_first: bool) -> Tensor:
    """Normalise the input of a sublayer if pre-norm."""
    return norm(states) if norm_first else states


def after(norm: nn.LayerNorm, states: Tensor, norm_first: bool) -> Tensor:
    """Normalise the residual sum after a sublayer if post-norm."""
    return states if norm_first else norm(states)


class AuthorsEncoderLayer(nn.TransformerEncoderLayer):
    """torch's encoder layer, with positions added to queries and keys."""

    def forward(self, states: Tensor, encodings: Tensor, padding: Tensor) -> Tensor:
        """Cells (B, N, D), their positions, padding (B, N) True at padding -> (B, N, D)."""
        first = self.norm_first
        normed = before(self.norm1, states, first)
        keys = normed + encodings
        found = self.self_attn(keys, keys, normed, key_padding_mask=padding, need_weights=False)[0]
        states = after(self.norm1, states + found, first)
        widened = self.activation(self.linear1(before(self.norm2, states, first)))
        return after(self.norm2, states + self.linear2(widened), first)


class AuthorsDecoderLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer, with positions added to queries and keys."""

    def forward(self, states: Tensor, queries: Tensor, memory: Tensor, encodings: Tensor, padding: Tensor) -> Tensor:
        """States and queries (B, Q, D), memory (B, N, D), its positions, padding (B, N) True at padding -> (B, Q,
        D)."""
        first = self.norm_first
        normed = before(self.norm1, states, first)
        keys = normed + queries
        found = self.self_attn(keys, keys, normed, need_weights=False)[0]
        states = after(self.norm1, states + found, first)
        asking = before(self.norm2, states, first) + queries
        found = self.multihead_attn(asking, memory + encodings, memory, key_padding_mask=padding, need_weights=False)[
            0
        ]
        states = after(self.norm2, states + found, first)
        widened = self.activation(self.linear1(before(self.norm3, states, first)))
        return after(self.norm3, states + self.linear2(widened), first)


class AuthorsStack(nn.Module):
    """Stack of layers with an optional final norm."""

    def __init__(self, layer_class: type[nn.Module], layers: int, config: TfmDetrConfig, norm: bool):
        super().__init__()
        sizes = (config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim)
        self.layers = nn.ModuleList(
            layer_class(*sizes, activation="relu", batch_first=True, norm_first=config.norm_first)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(config.d_model) if norm else nn.Identity()

    def forward(self, states: Tensor, *others: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        for layer in self.layers:
            states = layer(states, *others)
        return self.norm(states)


class AuthorsTransformer(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: TfmDetrConfig):
        super().__init__()
        self.encoder = AuthorsStack(AuthorsEncoderLayer, config.encoder_layers, config, norm=config.norm_first)
        self.decoder = AuthorsStack(AuthorsDecoderLayer, config.decoder_layers, config, norm=True)

    def forward(self, cells: Tensor, encodings: Tensor, padding: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Cells (B, N, D), positions, padding (B, N) True at padding, queries (Q, D) -> (B, Q, D), memory (B, N,
        D)."""
        memory = self.encoder(cells, encodings, padding)
        queries = queries.expand(len(cells), -1, -1)
        return self.decoder(torch.zeros_like(queries), queries, memory, encodings, padding), memory


class AuthorsBoxes(nn.Module):
    """Box head: three linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, size) for size in (width, width, 4))

    def forward(self, states: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, 4)."""
        first, second, last = self.layers
        return last(second(first(states).relu()).relu()).sigmoid()


class AuthorsDetr(PreTrainedModel):
    """Detector with the authors' weight names."""

    config: AuthorsDetrConfig
    main_input_name = "pixel_values"

    def __init__(self, config: AuthorsDetrConfig):
        super().__init__(config)
        self.backbone = nn.ModuleList([AuthorsBackbone(config), AuthorsPositions(config)])
        self.input_proj = nn.Conv2d(self.backbone[0].channels[-1], config.d_model, kernel_size=1)
        self.query_embed = nn.Embedding(config.num_queries, config.d_model)
        self.transformer = AuthorsTransformer(config)
        self.class_embed = nn.Linear(config.d_model, config.num_labels + 1)
        self.bbox_embed = AuthorsBoxes(config.d_model)
        self.post_init()

    def run(self, images: Tensor, pixel_mask: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
        """Return backbone maps, the projected last map, its padding, query states (B, Q, D) and memory (B, N, D)."""
        backbone, positions = self.backbone
        maps = backbone(images)
        projected = self.input_proj(maps[-1])
        if pixel_mask is None:
            pixel_mask = images.new_ones(images.shape[0], *images.shape[2:])
        mask = nn.functional.interpolate(pixel_mask[None].float(), size=projected.shape[2:])[0].bool()
        cells = projected.flatten(2).transpose(1, 2)
        encodings = positions(mask).to(cells.dtype)
        states, memory = self.transformer(cells, encodings, ~mask.flatten(1), self.query_embed.weight)
        return maps, projected, ~mask, states, memory

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DetrObjectDetectionOutput:
        """See `TfmDetrForObjectDetection.forward`."""
        states = self.run(pixel_values, pixel_mask)[3]
        logits, boxes = self.class_embed(states), self.bbox_embed(states)
        return DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes, last_hidden_state=states)


class AuthorsAttentionMap(nn.Module):
    """Attention weights of the queries over the memory, with one softmax over all heads and cells."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear, self.k_linear = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """States (B, Q, D), memory (B, N, D), padding (B, h, w) True at padding -> (B, Q, heads, h, w)."""
        query, key = (
            linear(each).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, each in ((self.q_linear, states), (self.k_linear, memory))
        )  # (B, heads, ..., D / heads)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(padding.flatten(1)[:, None, None], -torch.inf).transpose(1, 2)
        return scores.flatten(2).softmax(-1).view_as(scores).unflatten(-1, padding.shape[1:])


class AuthorsMaskHead(nn.Module):
    """Five convolutions, upsampled three times to the sizes of the backbone's maps (FPN)."""

    def __init__(self, width: int, heads: int, channels: list[int]):
        super().__init__()
        widths = [width + heads, width + heads, *(width // 2**i for i in range(1, 5))]
        for i in range(5):
            setattr(self, f"lay{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3, padding=1))
            setattr(self, f"gn{i + 1}", nn.GroupNorm(8, widths[i + 1]))
        for i in range(3):
            setattr(self, f"adapter{i + 1}", nn.Conv2d(channels[2 - i], widths[i + 2], 1))
        self.out_lay = nn.Conv2d(widths[5], 1, 3, padding=1)

    def forward(self, states: Tensor, maps: list[Tensor], queries: int) -> Tensor:
        """(B Q, D + heads, h, w) and maps (B, F, h', w'), the largest first -> (B Q, 1, h', w') at the largest
        size."""
        for i in range(1, 6):
            if i > 2:
                larger = self.get_submodule(f"adapter{i - 2}")(maps[5 - i]).repeat_interleave(queries, dim=0)
                states = larger + nn.functional.interpolate(states, size=larger.shape[2:], mode="nearest")
            states = self.get_submodule(f"gn{i}")(self.get_submodule(f"lay{i}")(states)).relu()
        return self.out_lay(states)


class AuthorsDetrSegm(PreTrainedModel):
    """Detector and mask head with the authors' weight names."""

    config: AuthorsDetrConfig
    main_input_name = "pixel_values"

    def __init__(self, config: AuthorsDetrConfig):
        super().__init__(config)
        self.detr = AuthorsDetr(config)
        width, heads = config.d_model, config.encoder_attention_heads
        self.bbox_attention = AuthorsAttentionMap(width, heads)
        self.mask_head = AuthorsMaskHead(width, heads, self.detr.backbone[0].channels[:3])
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DetrSegmentationOutput:
        """See `TfmDetrForPanopticSegmentation.forward`."""
        maps, projected, padding, states, memory = self.detr.run(pixel_values, pixel_mask)
        logits, boxes = self.detr.class_embed(states), self.detr.bbox_embed(states)
        attention = self.bbox_attention(states, memory, padding)
        B, Q = attention.shape[:2]
        inputs = torch.cat([projected.repeat_interleave(Q, dim=0), attention.flatten(0, 1)], dim=1)
        masks = self.mask_head(inputs, maps[:3], Q)[:, 0].unflatten(0, (B, Q))
        return DetrSegmentationOutput(logits=logits, pred_boxes=boxes, pred_masks=masks, last_hidden_state=states)
