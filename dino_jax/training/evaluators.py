"""Evaluations while training, as `config.evals` names them: each with its period and settings.

To add one, write a function like `knn_evaluator`, name it in `EVALUATORS`, and give its settings a section in
configs/default.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.checkpoints import model_card
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Source, open_source
from dino_jax.distributed import fsdp
from dino_jax.distributed.processes import on_every_process
from dino_jax.evals import knn, probe
from dino_jax.evals.common import label_free, pictures
from dino_jax.evals.common.extraction import FeatureTable, extract_source
from dino_jax.evals.common.images import draw_sheet
from dino_jax.models import from_card
from dino_jax.training.setup import Setup, State, backbone_variables
from dino_jax.weights.backbone import Backbone

PICTURED, PICTURED_BANK = 6, 500  # images whose neighbors are drawn, and images among which they are looked up
Evaluate = Callable[[State], dict[str, Any]]  # scalars by name, and pictures: uint8 [H, W, 3]


class Unavailable(NamedTuple):
    """Why an evaluation does not run."""

    reason: str


class Evaluator(NamedTuple):
    """An evaluation and its period."""

    every_steps: int
    evaluate: Evaluate  # state -> scalars and pictures to log

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to run after this step: before the first, after the last, and every so many between."""
        return step in (0, total_steps) or step % self.every_steps == 0


def build_evaluators(
    setup: Setup, source: Source, mesh: Mesh, steps_per_epoch: int, info: Callable[[str], None]
) -> list[Evaluator]:
    """The evaluators of config.evals that can run. info: receives a line for each that cannot."""
    evaluators = []
    for name, settings in setup.config.evals.items():
        if settings.every_epochs:
            built = EVALUATORS[name](setup, settings, source, mesh)
        else:
            built = Unavailable(f"evals.{name}.every_epochs is 0")
        if isinstance(built, Unavailable):
            info(f"no {name} evaluation while training: {built.reason}")
        else:
            evaluators.append(Evaluator(settings.every_epochs * steps_per_epoch, built))
    return evaluators


def knn_evaluator(setup: Setup, settings: ConfigDict, source: Source, mesh: Mesh) -> Evaluate | Unavailable:
    """k-NN top-1 in percent of teacher and student. `source` is the bank where settings.train names none."""
    if not settings.test:
        return Unavailable("evals.knn.test is not set")
    bank = on_every_process(lambda: open_source(settings.train), size=len) if settings.train else source
    queries = on_every_process(lambda: open_source(settings.test), size=len)
    if not (bank.num_classes and queries.num_classes):
        unlabeled = settings.test if bank.num_classes else settings.train or setup.config.data.source
        return Unavailable(f"{unlabeled} has no labels")
    knn.check_classes(bank, queries)
    backbone, config = setup.method.backbone, setup.config

    def both(variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Features of teacher and student side by side, so that each image is read once."""
        tokens = [backbone.apply(variables[who], images) for who in ("teacher", "student")]
        return jnp.concatenate([one.cls for one in tokens], axis=-1)

    def evaluate(state: State) -> dict[str, float]:
        variables = fsdp.unshard({who: backbone_variables(state, who) for who in ("teacher", "student")}, mesh)
        train, test = (
            feature_table(both, variables, rows, what, config, mesh, config.data.mean, config.data.std)
            for rows, what in ((bank, "k-NN bank"), (queries, "k-NN queries"))
        )
        scalars = {}
        for i, who in enumerate(variables):
            rows, answers = (np.split(table.features, 2, axis=1)[i] for table in (train, test))
            accuracy = knn.knn_accuracy(
                rows, train.labels, answers, test.labels, (settings.k,), num_classes=bank.num_classes, mesh=mesh
            )
            scalars[f"knn_top1_{who}"] = accuracy[settings.k][0]
        return scalars

    return evaluate


def probe_evaluator(setup: Setup, settings: ConfigDict, source: Source, mesh: Mesh) -> Evaluate | Unavailable:
    """Measures of the teacher without labels, on fixed crops of fixed images of `source`: see `evals.probe`."""
    config = setup.config
    if len(source) < 2:
        return Unavailable("data.source has a single image")
    augment = probe.global_crops(config.crops, config.data.mean, config.data.std)
    reading = probe.Reading(
        images=settings.images,
        pairs=settings.pairs,
        seed=config.seed,
        canvas_size=config.data.canvas_size,
        pixels=Pixels.of_config(config),
        batch_size=config.eval.batch_size,
        workers=config.data.workers,
    )

    def evaluate(state: State) -> dict[str, float]:
        teacher = fsdp.unshard({"teacher": backbone_variables(state, "teacher")}, mesh)["teacher"]
        last_layer = fsdp.unshard(state.teacher["head"]["last_layer"], mesh)
        features = probe.crop_features(setup.method.backbone.apply, teacher, augment, source, mesh, reading)
        found = probe.measures(features)
        found["distinct_prototypes"] = float(label_free.distinct_prototypes(np.asarray(last_layer["weight_v"])))
        return {f"probe_{name}": value for name, value in found.items()}

    return evaluate


def pictures_evaluator(setup: Setup, settings: ConfigDict, source: Source, mesh: Mesh) -> Evaluate | Unavailable:
    """Nearest neighbors, attention and components of patches of the teacher, on the same images each time."""
    del settings
    if jax.process_count() > 1:
        return Unavailable("the run has several processes: `dino-jax report` draws pictures of its last checkpoint")
    if len(source) < 2:
        return Unavailable("data.source has a single image")
    card = model_card(setup.config, 0)
    model = from_card(card["architecture"])

    def evaluate(state: State) -> dict[str, np.ndarray]:
        variables = fsdp.unshard({"teacher": backbone_variables(state, "teacher")}, mesh)["teacher"]
        backbone = Backbone(model, variables, card)
        found = {"neighbors": pictures.neighbors(backbone, source, PICTURED, PICTURED_BANK)}
        if backbone.family.attention_maps:
            found["attention"] = pictures.attention(backbone, source)
            found["components"] = pictures.components(backbone, source)
        return {name: np.asarray(draw_sheet(_titled(rows))) for name, rows in found.items() if rows}

    return evaluate


def _titled(rows: list[pictures.Row]) -> list[dict[str, np.ndarray]]:
    """Rows of (caption, image) as {title: image}; a title is unique in its row."""
    return [{f"{caption}{' ' * i}": image for i, (caption, image) in enumerate(row)} for row in rows]


EVALUATORS: dict[str, Callable[[Setup, ConfigDict, Source, Mesh], Evaluate | Unavailable]] = {
    "knn": knn_evaluator,
    "probe": probe_evaluator,
    "pictures": pictures_evaluator,
}


def feature_table(
    apply_fn: Callable[..., Any],
    variables: Any,
    source: Source,
    what: str,
    config: ConfigDict,
    mesh: Mesh,
    mean: Any,
    std: Any,
) -> FeatureTable:
    """`extract_source` of a source with the image sizes and batch size of config.eval."""
    return extract_source(
        apply_fn,
        variables,
        source,
        what,
        mesh,
        batch_size=config.eval.batch_size,
        resize=config.eval.resize,
        crop=config.eval.crop,
        pixels=Pixels.of_config(config),
        mean=mean,
        std=std,
        workers=config.data.workers,
    )
