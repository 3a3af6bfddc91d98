"""Conversion between images and sequences of patches (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1).

    pixels (B, C, H, W) -> patches (B, N, P P C) -> linear -> tokens (B, N, D)

Shapes: B images; C channels; H, W pixels; P patch side (Ph x Pw if the sides differ); N = (H / Ph)(W / Pw) patches in
row-major order; D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .linear import floating_dtype, is_plain

Size = int | Sequence[int]


def sides(size: Size) -> tuple[int, int]:
    """Return a size given as one number or a pair as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def patch_grid(height: int, width: int, patch_size: Size, argument: str = "pixel_values") -> tuple[int, int]:
    """Return the number of rows and columns of patches in an image.

    Raises:
        ValueError: the image size is not divisible by the patch size.
    """
    patch_height, patch_width = sides(patch_size)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"{argument} must be a multiple of the patch in height and width, got {height} x {width} for patches of "
            f"{patch_height} x {patch_width}"
        )
    return height // patch_height, width // patch_width


def patchify(pixel_values: Tensor, patch_size: Size) -> Tensor:
    """Split images into patches; pixels of a patch are in row-major order with channels last.

    Args:
        pixel_values: (B, C, H, W).

    Returns:
        (B, N, P P C).
    """
    B, C, H, W = pixel_values.shape
    rows, columns = patch_grid(H, W, patch_size)
    height, width = sides(patch_size)
    patches = pixel_values.view(B, C, rows, height, columns, width)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, height * width * C)


def unpatchify(patches: Tensor, patch_size: Size, image_size: Size) -> Tensor:
    """Invert `patchify`: (B, N, P P C) -> (B, C, H, W) of the given image size in pixels.

    Raises:
        ValueError: the number of patches does not match the image size, or the patch length is not a multiple of the
            number of pixels in a patch.
    """
    height, width = sides(patch_size)
    rows, columns = patch_grid(*sides(image_size), patch_size, "image_size")
    B, N, features = patches.shape
    if rows * columns != N:
        raise ValueError(f"an image of {rows} x {columns} patches has {rows * columns} of them, got {N}")
    if features % (height * width):
        raise ValueError(f"patches must have a multiple of {height * width} features (patch_size), got {features}")
    C = features // (height * width)
    pixels = patches.view(B, rows, columns, height, width, C).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(B, C, rows * height, columns * width)


def resize_grid(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a table of one vector per patch to another grid by bicubic interpolation (section 3.2).

    Args:
        table: (1, rows * columns, D), in row-major order.
        grid: (rows, columns) of the table.
        new_grid: (rows, columns) of the result.

    Returns:
        (1, new rows * new columns, D).
    """
    if grid == new_grid:
        return table
    plane = table.view(1, *grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    plane = nn.functional.interpolate(plane.float(), size=new_grid, mode="bicubic", align_corners=False)
    return plane.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def resize_grids(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], sizes: Tensor) -> Tensor:
    """Resize a table like `resize_grid`, for each image of a padded batch to the grid that the image alone has.

    Args:
        table: (1, rows * columns, D), in row-major order.
        grid: (rows, columns) of the table.
        new_grid: (rows, columns) of the padded images.
        sizes: (B, 2) int64, rows and columns of each image without padding.

    Returns:
        (B, new rows * new columns, D); the table's border repeats in the padding.
    """
    plane = table.view(1, *grid, -1).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
    # `grid_sample` counts from -1 to 1, from border to border of the table.
    rows, columns = (
        (2 * torch.arange(count, device=table.device) + 1) / sizes[:, axis, None] - 1
        for axis, count in enumerate(new_grid)
    )  # (B, new rows), (B, new columns)
    points = torch.stack(
        [columns[:, None].expand(-1, new_grid[0], -1), rows[:, :, None].expand(-1, -1, new_grid[1])], dim=-1
    )  # (B, new rows, new columns, 2)
    plane = plane.expand(len(sizes), -1, -1, -1)
    plane = nn.functional.grid_sample(plane, points, mode="bicubic", padding_mode="border", align_corners=False)
    return plane.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def unpadded_sizes(pixel_mask: Tensor) -> Tensor:
    """Return the height and width of images without padding: mask (B, H, W), 0 for padding -> (B, 2) int64."""
    covered = pixel_mask.bool()
    return torch.stack([covered.any(dim=2).sum(dim=1), covered.any(dim=1).sum(dim=1)], dim=1)


def unpadded_grid(pixel_mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the rows and columns of patches that images cover, at least in part.

    Args:
        pixel_mask: (B, H, W), 1 for image, at the top left, and 0 for padding.
        grid: (rows, columns) of the padded images.

    Returns:
        (B, 2) int64, at least 1.
    """
    sizes = unpadded_sizes(pixel_mask)
    cells, pixels = sizes.new_tensor(grid), sizes.new_tensor(pixel_mask.shape[1:])
    return ((sizes * cells + pixels - 1) // pixels).clamp_min(1)


def patch_mask(sizes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mask of the patches of padded images: (B, 2) rows and columns -> (B, rows * columns) bool."""
    rows, columns = (
        torch.arange(count, device=sizes.device) < sizes[:, axis, None] for axis, count in enumerate(grid)
    )
    return (rows[:, :, None] & columns[:, None]).flatten(1)


def select(patches: Tensor, keep: Tensor | None) -> Tensor:
    """Select the patches ``keep`` (B, K) of (B, N, D), in that order: (B, K, D); return all if ``keep`` is None."""
    return patches if keep is None else patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))


class PatchEmbedding(nn.Module):
    """Linear patch embedding (equation 1), stored as the equivalent convolution, as in checkpoints.

    The convolution's weight (D, C, Ph, Pw) is applied as a matrix to the selected patches only; a convolution that is
    not plain (see `is_plain`) is called instead.

    Args:
        num_channels: C.
        patch_size: P.
        hidden_size: D.
    """

    def __init__(self, num_channels: int, patch_size: Size, hidden_size: int):
        super().__init__()
        self.num_channels = num_channels
        self.patch_size = sides(patch_size)
        self.projection = nn.Conv2d(num_channels, hidden_size, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed patches of images (B, C, H, W) -> (B, N, D), or (B, K, D) for the patches ``keep`` (B, K) int64."""
        pixel_values = pixel_values.to(floating_dtype(self.projection, pixel_values.dtype))
        if not is_plain(self.projection, nn.Conv2d):
            return select(self.projection(pixel_values).flatten(2).transpose(1, 2), keep)
        patches = select(patchify(pixel_values, self.patch_size), keep)  # (B, K, P P C)
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P P C)
        return nn.functional.linear(patches, weight, self.projection.bias)

    def check(self, pixel_values: Tensor) -> tuple[int, int]:
        """Check images (B, C, H, W) and return the number of rows and columns of patches.

        Raises:
            ValueError: the number of channels is wrong, or the image size is not divisible by the patch size.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (B, {self.num_channels}, H, W), got {tuple(pixel_values.shape)}"
            )
        return patch_grid(*pixel_values.shape[2:], self.patch_size)
