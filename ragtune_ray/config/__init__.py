"""The typed settings tree: defaults < YAML file < `section.field=value` arguments.

In: a YAML file and dotted overrides. Out: one frozen `Config`, every field checked. Each file contains the settings of one
room; the string under a field is its documentation. Importing this room loads neither torch nor Ray.
"""

from ragtune_ray.config.answering import Answer, Prompt
from ragtune_ray.config.arms import ARMS, Arm, Mode, hosted_name, is_mode, is_tuned, num_parts, retrieves, without_name
from ragtune_ray.config.cluster import Cluster
from ragtune_ray.config.evaluation import (
    AS_CONFIGURED,
    WITHOUT_GOLD,
    Compare,
    DecidingMetric,
    Evaluate,
    GradedMetric,
    Hosted,
    Judge,
    Language,
    Normalization,
    Prices,
)
from ragtune_ray.config.generation import Generator
from ragtune_ray.config.index import Index, IndexKind, Retrieval, RetrievalMode, Rewrite, WordLanguage
from ragtune_ray.config.ingest import Chunking, Corpus, Queries, SplitName
from ragtune_ray.config.models import Encoder, Precision
from ragtune_ray.config.section import Section
from ragtune_ray.config.serving import Replicas, RetrievalUse, RetrieverReplicas, Serve
from ragtune_ray.config.source import ConfigError
from ragtune_ray.config.training import Objective, Training
from ragtune_ray.config.tree import Config, describe, describe_section, load, load_config, settings_page
from ragtune_ray.config.tuning import Component, Tune

__all__ = [
    "ARMS", "AS_CONFIGURED", "WITHOUT_GOLD", "Answer", "Arm", "Chunking", "Cluster", "Compare", "Component", "Config",
    "ConfigError", "Corpus", "DecidingMetric", "Encoder", "Evaluate", "Generator", "GradedMetric", "Hosted", "Index",
    "IndexKind", "Judge", "Language", "Mode", "Normalization", "Objective", "Precision", "Prices", "Prompt", "Queries",
    "Replicas", "Retrieval", "RetrievalMode", "RetrievalUse", "RetrieverReplicas", "Rewrite", "Section", "Serve",
    "SplitName", "Training", "Tune", "WordLanguage", "describe", "describe_section", "hosted_name", "is_mode", "is_tuned",
    "load", "load_config", "num_parts", "retrieves", "settings_page", "without_name",
]  # fmt: skip
