"""Retrieve, fine-tune, or both? Measured on your own documents, then run at scale on Ray.

    import ragtune_ray as rt

    config = rt.load_config("ragtune.yaml")
    rt.build_index(config)
    hits = rt.Retriever.open(config).search(["When was Hubble launched?"], top_k=3)
    print(rt.ask(config, "When was Hubble launched?").text)

The public API is `__all__`; docs/python-api.md describes it. Names are imported when they are first used, so that importing
the package loads neither torch nor Ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragtune_ray.asking import SourcedAnswer, ask
    from ragtune_ray.cluster.answering.answer import answer
    from ragtune_ray.cluster.answering.evaluate import evaluate
    from ragtune_ray.cluster.answering.retrieve import retrieve
    from ragtune_ray.cluster.comparing.calibrate import calibrate
    from ragtune_ray.cluster.comparing.compare import compare
    from ragtune_ray.cluster.indexing.index import build_index
    from ragtune_ray.cluster.indexing.update import delete_documents, upsert_documents
    from ragtune_ray.cluster.questions.questions import write_questions
    from ragtune_ray.cluster.serving.serve import serve
    from ragtune_ray.cluster.training.train import train
    from ragtune_ray.cluster.tuning.tune import tune
    from ragtune_ray.config import Config, load_config
    from ragtune_ray.index.retriever import Retriever

__all__ = [  # noqa: RUF022  # by stage
    # settings
    "Config",
    "load_config",
    # documents -> index
    "build_index",
    "upsert_documents",
    "delete_documents",
    # questions -> passages
    "Retriever",
    "retrieve",
    # questions -> answers
    "ask",
    "SourcedAnswer",
    "answer",
    # answers -> scores
    "evaluate",
    "compare",
    "calibrate",
    # documents -> questions
    "write_questions",
    # scores -> better models
    "train",
    "tune",
    # HTTP endpoint
    "serve",
    # errors
    "RagtuneError",
]

__version__ = "0.1.0"

_MODULES = {
    "Config": "config",
    "load_config": "config",
    "build_index": "cluster.indexing.index",
    "upsert_documents": "cluster.indexing.update",
    "delete_documents": "cluster.indexing.update",
    "Retriever": "index.retriever",
    "retrieve": "cluster.answering.retrieve",
    "ask": "asking",
    "SourcedAnswer": "asking",
    "answer": "cluster.answering.answer",
    "evaluate": "cluster.answering.evaluate",
    "compare": "cluster.comparing.compare",
    "calibrate": "cluster.comparing.calibrate",
    "write_questions": "cluster.questions.questions",
    "train": "cluster.training.train",
    "tune": "cluster.tuning.tune",
    "serve": "cluster.serving.serve",
}


class RagtuneError(Exception):
    """Base of every error this package raises about settings, data, files or the cluster.

    A wrong argument from Python code is a plain ValueError or TypeError, as anywhere.

        RagtuneError
            config      ConfigError
            schema      SchemaError
            storage     ArtifactError > ConflictError (two publishers of an index), CacheError, SpaceError,
                        UrlError
            ingest      InputError, ChangedError, ParseError > TransientError (try again later), LeakError, TokenizerError
            models      ModelError
            index       IndexDataError, SelectionError, PlanError
            generation  GeneratorError, Overloaded, RequestFailed
            answering   PromptError
            evaluation  MetricError, ComparisonError, GradingError, HalvingError, ReplyError, LabelError, DrawingError,
                        ReviewError
            training    TrainingError
            tuning      LedgerError
            serving     ApiError (an HTTP status and message), HotSwapError, McpMissingError
            cluster     StartError, StageError, CorpusError, DuplicateError, UpdateError, OvertakenError, AnswerError,
                        EvaluationError, MeasureError, QuestionsError, TuneError, ServeError, ShardError
    """


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
