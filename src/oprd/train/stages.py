"""Which stage of a recipe a step belongs to."""

from oprd.config.recipe import Recipe
from oprd.train.checkpoint import find_checkpoint
from oprd.train.run_folder import RunFolder


def stage_of(recipe: Recipe, step: int) -> int:
    """The stage whose update is the `step`-th, counted from 1."""
    return next(stage for stage, last in enumerate(recipe.last_steps()) if step <= last)


def first_stage(recipe: Recipe) -> int:
    """The stage to start in: that of the checkpoint to resume from, whose optimizer is stored there."""
    asked = recipe.resume_from_checkpoint
    found = find_checkpoint(RunFolder(recipe.output_dir).checkpoints, asked) if asked is not None else None
    return 0 if found is None else stage_of(recipe, int(found.name.partition("-")[2]))
