"""Input embeddings of Vision Transformers (Dosovitskiy et al. 2021, arXiv:2010.11929, equation 1).

    pixels (B, C, H, W) -> patches (B, N, P P C), or K of them -> linear + positions -> [class] + tokens (B, 1 + N, D)

Shapes: B images; C channels; H, W pixels; P patch side; N patches in row-major order; D = config.hidden_size.
"""

import torch
from torch import Tensor, nn

from .backbones import TimmFeatures
from .configuration_vit import ImageEncoderConfig
from .dropout import Dropout
from .patches import PatchEmbedding, Size, patch_grid, resize_grid, resize_grids, sides
from .positions import join_axes, sincos_2d


def fixed_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sine-cosine positions of a grid of patches, with zeros for a leading [class] token: (1, 1 + N, dim)."""
    return nn.functional.pad(sincos_2d(*grid, dim), (0, 0, 1, 0))[None]


class TfmViTEmbeddings(nn.Module):
    """Patch embeddings plus position embeddings, preceded by the [class] token (equation 1).

    The batch norms of a backbone are replaced by group norms, as in the paper's hybrids (section 4.1, "Model
    Variants", following Kolesnikov et al. 2020, BiT, arXiv:1912.11370), so that an image's encoding does not depend on
    the rest of the batch. The paper's standardised convolutions depend on the backbone: timm's "bit" ResNets have
    them.
    """

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.backbone = None
        channels, grid = config.num_channels, sides(config.image_size)
        if config.backbone is not None:
            self.backbone = TimmFeatures(config.backbone, channels, (config.backbone_out_index,), norm="group")
            channels, grid = self.backbone.channels[-1], self.backbone.grid(*grid)
        self.grid = patch_grid(*grid, config.patch_size, "image_size")
        self.kind = config.position_embedding_type
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = PatchEmbedding(channels, config.patch_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        rows, columns = self.grid
        table = torch.zeros(1, 1 + rows * columns, config.hidden_size)
        if self.kind == "learned":
            self.position_embeddings = nn.Parameter(table)
        elif self.kind == "sincos_2d":
            # Fixed, but saved in checkpoints, where transformers' ViTMAE expects it.
            self.register_buffer("position_embeddings", self.fixed_positions())
        else:
            self.row_embeddings = nn.Parameter(torch.zeros(rows, config.hidden_size // 2))
            self.column_embeddings = nn.Parameter(torch.zeros(columns, config.hidden_size // 2))

    def fixed_positions(self) -> Tensor:
        """Return the positions of "sincos_2d", (1, 1 + N, D)."""
        return fixed_positions(self.grid, self.cls_token.shape[-1])

    def set_image_size(self, image_size: Size) -> None:
        """Resize the position embeddings permanently to images of another size in pixels (section 3.2).

        Raises:
            ValueError: the image size is not divisible by the patch size.
        """
        height, width = sides(image_size)
        if self.backbone is not None:
            height, width = self.backbone.grid(height, width)
        self.set_grid(patch_grid(height, width, self.patch_embeddings.patch_size, "image_size"))

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resize the position embeddings permanently to a grid of (rows, columns) patches."""
        if self.kind == "learned_2d":
            for name, old, new in zip(("row_embeddings", "column_embeddings"), self.grid, grid, strict=True):
                resized = resize_grid(getattr(self, name)[None], (old, 1), (new, 1))[0]
                setattr(self, name, nn.Parameter(resized.clone()))
            self.grid = grid
            return
        first, patches = self.positions(grid)
        self.grid = grid
        if self.kind == "learned":
            self.position_embeddings = nn.Parameter(torch.cat([first, patches], dim=1))
        else:
            self.position_embeddings = self.fixed_positions().to(self.position_embeddings)

    def positions(self, grid: tuple[int, int], sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return positions of the [class] token (1, 1, D) and of the patches of a grid (1, N, D).

        Args:
            sizes: (B, 2) rows and columns that the images of a padded batch cover; the positions are then (B, N, D).
        """
        if self.kind == "learned_2d":
            table = join_axes(self.row_embeddings, self.column_embeddings)
            first = torch.zeros_like(self.cls_token)
        else:
            first, table = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        if sizes is not None:
            return first, resize_grids(table, self.grid, grid, sizes)
        return first, resize_grid(table, self.grid, grid)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = None,
        keep: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Embed images.

        Args:
            pixel_values: (B, C, H, W).
            interpolate_pos_encoding: False raises an error for images of another size than the configuration's; by
                default the position embeddings are resized to them.
            keep: (B, K) int64, indices of the patches to embed, in this order; default: all, in image order.
            sizes: (B, 2) int64, rows and columns of patches that each image covers, if some are padded; the position
                embeddings are resized to these. Not with ``keep``.

        Returns:
            (B, 1 + K, D), K = N by default.

        Raises:
            ValueError: the images do not fit the model.
        """
        features = pixel_values if self.backbone is None else self.backbone(pixel_values)[-1]
        grid = self.patch_embeddings.check(features)
        if interpolate_pos_encoding is False and grid != self.grid:
            raise ValueError(
                f"pixel_values have {grid[0]} x {grid[1]} patches, but the model has positions for {self.grid[0]} x "
                f"{self.grid[1]}: leave interpolate_pos_encoding unset to resize them"
            )
        # In a checkpoint loaded in half precision a fixed table stays float32.
        first, positions = (table.to(self.cls_token.dtype) for table in self.positions(grid, sizes))
        if keep is not None:
            positions = positions[0][keep]  # (B, K, D)
        tokens = self.patch_embeddings(features, keep) + positions
        cls_token = (self.cls_token + first).expand(tokens.shape[0], -1, -1)
        return self.dropout(torch.cat([cls_token.to(tokens.dtype), tokens], dim=1))
