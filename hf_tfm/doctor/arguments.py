"""Checks of hyperparameters against the paper's: learning rates, schedule, clipping, losses.

Learning rates are those of the model's own paper, its class attribute ``published_rates``; gradient clipping as in the
authors' code of DETR (Carion et al. 2020, arXiv:2005.12872) and Deformable DETR (Zhu et al. 2021, arXiv:2010.04159).
"""

import math
from collections.abc import Iterator

from ..training.optim import parameter_groups
from .findings import Finding, failed, graded, ok, skipped, warning
from .splits import WIDTH, Case

DETR_RATES = (1e-4, 1e-5, 64)  # for a detector that does not tell: learning rates, of the backbone, images per step
FACTOR = 10  # a learning rate this far from the paper's gets a warning, and this far again fails
PAPER_NORM, LOOSE_NORM = 0.1, 1.0
FEWEST_STEPS = 2000  # for a new model: preset digits trains a tiny one for 3,000, the paper for 277,000 (150 epochs)


def learning_rate(case: Case) -> Iterator[Finding]:
    """Learning rates and batch size fit the paper's: for DETR 1e-4 and, for the backbone, 1e-5 at 64 images per step,
    for Deformable DETR 2e-4 and 2e-5 at 32."""
    args = case.args
    if (rates := getattr(case.model, "published_rates", DETR_RATES)) is None:
        yield skipped("no learning rate of AdamW was published for this model")
        return
    paper_rate, paper_backbone, paper_batch = rates
    resolved, _ = args.resolve(case.steps_per_epoch, 0)
    try:
        groups = parameter_groups(case.model, resolved)
    except ValueError as error:  # a key of rate_factors matches no parameter
        yield failed(str(error), "name a part of the model, for instance {backbone: 0.1}")
        return
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    of_backbone = [] if case.backbone is None else case.backbone.parameters()
    inside = {id(parameter) for parameter in of_backbone} & rate_of.keys()
    rate = max(rate_of[key] for key in rate_of.keys() - inside)
    backbone = max((rate_of[key] for key in inside), default=None)
    linear = paper_rate * args.batch_size / paper_batch
    narrow = max(1.0, WIDTH / case.width)  # a narrower model tolerates a higher rate
    low, high = min(paper_rate, linear) / FACTOR, max(paper_rate, linear) * FACTOR * narrow
    used = f"{rate:.2g} for the Transformer, {'none' if backbone is None else f'{backbone:.2g}'} for the backbone, "
    used += f"{args.batch_size} images per step, {args.optimizer}"
    rule = f"the paper's {paper_rate:g} and {paper_backbone:g} at {paper_batch} images correspond to {linear:.2g} and "
    rule += f"{linear * paper_backbone / paper_rate:.2g} by linear scaling"
    if args.optimizer == "sgd":
        yield warning(f"{used}; {rule} for AdamW", "--optimizer adamw; detectors with queries train poorly with sgd")
    elif low <= rate < high:
        yield ok(f"{used}; {rule}")
    else:
        yield graded(
            not low / FACTOR <= rate <= high * FACTOR,
            f"{used}; {rule} (limits: {low:.2g} to {high:.2g})",
            f"set a learning rate from {min(paper_rate, linear):.2g} to {max(paper_rate, linear):.2g}",
        )
    trained = bool(args.model_name_or_path or args.pretrained_backbone)
    if backbone is not None and trained and backbone > 0.5 * rate:
        yield warning(
            "the backbone is pretrained but has the same learning rate as the rest", "--rate_factors.backbone 0.1"
        )
    if backbone is not None and not trained and backbone < 0.5 * rate:
        yield warning("the backbone has random weights but a lower learning rate than the rest", "remove rate_factors")


def schedule(case: Case) -> Finding:
    """Warm-up ends before training does, and a new model gets more than a few hundred steps."""
    args = case.args
    steps = args.max_steps or math.ceil(args.num_train_epochs * case.steps_per_epoch)
    resolved = args.resolve(case.steps_per_epoch, 0)[0]
    warmup = resolved.warmup(steps) if resolved.warmup_steps is None else resolved.warmup_steps
    message = f"{steps} steps, {steps / case.steps_per_epoch:.4g} epochs of {len(case.train.rows)} images; warm-up "
    message += f"{warmup} steps"
    if warmup >= steps:
        return failed(
            f"{message}: the learning rate never reaches its peak",
            f"--warmup_steps {steps // 20}, or train longer",
        )
    if not args.model_name_or_path and steps < FEWEST_STEPS:
        return warning(
            f"{message} (limit: {FEWEST_STEPS} for a new model)", "train longer, or start from a pretrained DETR"
        )
    return ok(message)


def gradient_clipping(case: Case) -> Finding:
    """Gradients are clipped to a small norm; they are large in the first steps of a detector."""
    norm = case.args.max_grad_norm
    if 0 < norm <= LOOSE_NORM:
        return ok(f"max_grad_norm {norm:g}; the authors' code uses {PAPER_NORM}")
    told = f"max_grad_norm {norm:g}" if norm else "max_grad_norm 0: gradients are not clipped"
    return warning(f"{told} (limit: at most {LOOSE_NORM:g})", f"--max_grad_norm {PAPER_NORM}, as in the authors' code")


def auxiliary_loss(case: Case) -> Finding:
    """Every decoder layer has a loss."""
    fitted = getattr(case.config, "auxiliary_loss", None)
    if fitted is None:
        return ok("the model has no option auxiliary_loss")
    if fitted:
        return ok(f"all {case.config.decoder_layers} decoder layers have a loss")
    return warning("only the last decoder layer has a loss", "--model.auxiliary_loss true, as in the paper")
