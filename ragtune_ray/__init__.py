"""Retrieve, fine-tune, or both? Measured on your own documents, then run at scale on Ray.

Import from the module that does the work; `ragtune_ray/` is listed in the README in the order of the data.
"""

__all__ = ["RagtuneError"]

__version__ = "0.1.0"


class RagtuneError(Exception):
    """Base of every error this package raises about settings, data, files or the cluster.

    A wrong argument from Python code is a plain ValueError or TypeError, as anywhere.

        RagtuneError
            config      ConfigError
            schema      SchemaError
            storage     ArtifactError > ConflictError (two publishers of an index), SpaceError, UrlError
            ingest      InputError, ParseError, LeakError, TokenizerError
            models      ModelError
            index       IndexDataError, SelectionError, PlanError
            generation  GeneratorError, Overloaded, RequestFailed
            answering   PromptError
            evaluation  MetricError, ComparisonError
            training    TrainingError
            tuning      LedgerError
            serving     ApiError (an HTTP status and message), HotSwapError
            cluster     StageError, CorpusError, DuplicateError, UpdateError, OvertakenError, AnswerError,
                        EvaluationError, MeasureError, TuneError, ServeError
    """
