"""Comparisons as `ragtune compare` writes them, and rows of answers, for the tests that show or count them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.schema import Answer

SOURCES = [
    {
        "number": 1,
        "title": "Arecibo Observatory",
        "document_id": "arecibo-observatory.md",
        "start": 1126,
        "end": 1324,
        "text": "To celebrate an upgrade of the equipment, a radio greeting of 1,679 bits was beamed on 16 November 1974 "
        "towards Messier 13, a cluster of stars in the constellation Hercules.",
        "cited": True,
    },
    {
        "number": 2,
        "title": "FAST",
        "document_id": "fast-telescope.md",
        "start": 0,
        "end": 118,
        "text": "The Five-hundred-metre Aperture Spherical Telescope lies in a natural hollow in Guizhou.",
        "cited": False,
    },
]


def interval(value: float, low: float, high: float, n: int = 113) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n}


def answer(text: str, score: float, sources: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    known = {"text": text, "score": score, "abstained": False, "status": "ok", "error": "", "sources": sources or []}
    return known | changes


def answer_row(name: str, text: str = "", passages: tuple[str, ...] = (), **changes: object) -> Answer:
    """A row of answers.parquet."""
    facts = {
        "query_id": name, "query": f"{name}?", "answer": text, "citations": (), "passage_ids": passages, "scores": (1.0,) * len(passages),
        "abstained": False, "seconds": 0.1, "prompt_tokens": 1, "completion_tokens": 1, "status": "ok", "error": "",
        "index_version": "", "model": "m",
    }  # fmt: skip
    return Answer(**{**facts, **changes})


def _arm(
    quality: tuple[tuple[float, float, float], ...], seconds: tuple[float, ...], cost: tuple[float, ...], **changes: Any
) -> dict[str, Any]:
    names = ("EM", "token_F1", "contains_answer")
    retrieval, generation = seconds
    index, training, per_1000 = cost
    return {
        "model": "SmolLM2-135M-Instruct",
        "model_fingerprint": "9f86d081884c7d65",
        "index_version": "",
        "statuses": {"ok": 119, "failed": 0},
        "quality": {name: interval(*ends) for name, ends in zip(names, quality, strict=True)}
        | {
            "abstention_recall": interval(0.5, 0.167, 0.833, 6),
            "abstention_precision": interval(0.375, 0.125, 0.75, 8),
            "false_abstention_rate": interval(0.044, 0.009, 0.088),
        },
        "explainability": {"cited_share": interval(0.0, 0.0, 0.0)},
        "latency": {
            "retrieval": {"p50_seconds": retrieval, "p95_seconds": retrieval * 1.9},
            "generation": {"p50_seconds": generation, "p95_seconds": generation * 1.6},
            "total": {"p50_seconds": retrieval + generation, "p95_seconds": retrieval * 1.9 + generation * 1.6},
            "n": 30,
        },
        "throughput": {"answers_per_second": round(2.2 / generation, 2)},
        "cost": {
            "index": index,
            "training": training,
            "one_off": index + training,
            "per_1000": per_1000,
            "answers": 100_000,
            "total": index + training + 100 * per_1000,
            "unit": "USD",
        },
        "freshness": None,
        "forgetting": None,
        "losses": {"correct": 7, "abstained": 5, "wrong": 101, "failed": 0},
        "violations": [],
        **changes,
    }


def _arms() -> dict[str, Any]:
    forgetting = {
        "before": interval(0.212, 0.171, 0.255, 200),
        "after": interval(0.149, 0.113, 0.188, 200),
        "difference": interval(-0.063, -0.094, -0.031, 200),
    }
    retrieving = {"index_version": "000003", "explainability": _cited((0.912, 0.858, 0.956), (0.784, 0.71, 0.85))}
    return {
        "base": _arm(((0.0, 0.0, 0.0), (0.058, 0.039, 0.081), (0.062, 0.027, 0.106)), (0.0, 0.31), (0, 0, 0.0081)),
        "rag": _arm(
            ((0.009, 0.0, 0.027), (0.181, 0.152, 0.213), (0.469, 0.381, 0.558)),
            (0.021, 0.62),
            (0.0009, 0, 0.0169),
            freshness={
                "visible_seconds": 3.42,
                "changed": interval(0.45, 0.25, 0.65, 20),
                "stale_share": interval(0.05, 0.0, 0.15, 20),
            },
            losses={"correct": 53, "not_retrieved": 6, "misread": 49, "abstained": 5, "failed": 0},
            **retrieving,
        ),
        "ft": _arm(
            ((0.035, 0.009, 0.071), (0.107, 0.074, 0.143), (0.044, 0.009, 0.088)),
            (0.0, 0.12),
            (0, 0.0642, 0.0032),
            model="models/space-sft",
            freshness={
                "visible_seconds": None,
                "changed": interval(0.0, 0.0, 0.0, 20),
                "stale_share": interval(0.3, 0.1, 0.5, 20),
            },
            forgetting=forgetting,
        ),
        "rag+ft": _arm(
            ((0.478, 0.389, 0.566), (0.591, 0.514, 0.666), (0.566, 0.478, 0.655)),
            (0.021, 0.41),
            (0.0009, 0.0642, 0.0113),
            model="models/space-sft",
            freshness={
                "visible_seconds": 3.42,
                "changed": interval(0.8, 0.6, 0.95, 20),
                "stale_share": interval(0.0, 0.0, 0.0, 20),
            },
            forgetting=forgetting,
            losses={"correct": 64, "not_retrieved": 6, "misread": 38, "abstained": 5, "failed": 0},
            **retrieving,
        ),
    }


def _cited(share: tuple[float, float, float], precision: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "cited_share": interval(*share),
        "citation_precision": interval(*precision, 103),
        "citation_recall": interval(0.735, 0.655, 0.814),
    }


def _differences() -> list[dict[str, Any]]:
    rows = [
        ("base", -0.533, -0.612, -0.451, "worse", None),
        ("rag", -0.41, -0.485, -0.334, "worse", None),
        ("ft", -0.484, -0.566, -0.4, "worse", None),
    ]
    keys = ("arm", "value", "low", "high", "conclusion", "needed")
    shared = {"against": "rag+ft", "n": 113, "confidence": 0.95, "deviation": 0.42}
    found = [shared | {"metric": "token_F1"} | dict(zip(keys, row, strict=True)) for row in rows]
    unclear = ("rag", -0.018, -0.071, 0.035, "open", 980)
    return [*found, shared | {"metric": "contains_answer"} | dict(zip(keys, unclear, strict=True))]


def _verdict() -> dict[str, Any]:
    return {
        "outcome": "recommended",
        "arm": "rag+ft",
        "headline": "Use rag+ft: retrieve, with the tuned generator.",
        "reason": [
            "Its token F1 is 0.591 [0.514, 0.666]; the next best, rag, has 0.181 [0.152, 0.213].",
            "The difference of +0.410 [+0.334, +0.485] over 113 questions lies beyond the margin of 0.02.",
            "100,000 answers cost 1.20 USD; rag costs 1.69 USD and is slower (p95 1.03 s against 0.70 s).",
        ],
        "warnings": ["Abstention rests on 6 unanswerable questions: its interval is wide."],
        "weighed": [
            {
                "dimension": "quality",
                "rule": "token F1, margin 0.02 at 95 % confidence",
                "result": "base, rag and ft are out",
            },
            {"dimension": "latency", "rule": "no limit set (compare.max_p95_seconds)", "result": "none is out"},
            {"dimension": "cost", "rule": "the cheaper of those that are left", "result": "rag+ft, 1.20 USD"},
            {
                "dimension": "freshness",
                "rule": "at most 10 % of answers tell an old fact",
                "result": "ft is out: 30 %",
            },
            {"dimension": "explainability", "rule": "no limit set", "result": "none is out"},
            {"dimension": "forgetting", "rule": "reported only", "result": "−0.063 [−0.094, −0.031]"},
        ],
    }


def _examples() -> list[dict[str, Any]]:
    return [
        {
            "query_id": "arecibo-observatory-4",
            "query": "Towards which star cluster was the Arecibo radio message of 1974 beamed?",
            "gold": ["Messier 13", "M13"],
            "answers": {
                "base": answer(
                    "The Arecibo message was sent towards the constellation Orion, where it will arrive.", 0.0
                ),
                "rag": answer("A radio greeting of 1,679 bits was beamed towards Messier 13 [1].", 0.308, SOURCES),
                "ft": answer("the Pleiades", 0.0),
                "rag+ft": answer("Messier 13 [1]", 1.0, SOURCES),
            },
        },
        {
            "query_id": "voyager-x-1",
            "query": "Who was the first person to walk on Titan?",
            "gold": [],
            "answers": {
                "base": answer("The first person to walk on Titan was Neil Armstrong.", 0.0),
                "rag": answer("I don't know.", 1.0, SOURCES[1:], abstained=True),
                "ft": answer("Carolyn Porco", 0.0),
                "rag+ft": answer(
                    "", 0.0, status="failed", error="prompt of 1,630 tokens is over prompt.max_tokens=1536"
                ),
            },
        },
    ]


def comparison() -> dict[str, Any]:
    """Four arms on 119 questions about space; rag+ft is recommended."""
    value = {
        "format": 1,
        "title": "data/space/questions.jsonl",
        "verdict": _verdict(),
        "metric": "token_F1",
        "margin": 0.02,
        "confidence": 0.95,
        "questions": {"total": 119, "answerable": 113, "unanswerable": 6, "needed": 84},
        "arms": _arms(),
        "ceilings": {
            "base model": {
                "closed_book": interval(0.058, 0.039, 0.081),
                "retrieved": interval(0.181, 0.152, 0.213),
                "gold_passage": interval(0.196, 0.166, 0.229),
            },
            "tuned model": {
                "closed_book": interval(0.107, 0.074, 0.143),
                "retrieved": interval(0.591, 0.514, 0.666),
                "gold_passage": interval(0.634, 0.561, 0.706),
            },
        },
        "differences": _differences(),
        "retrieval": {
            "MRR@10": interval(0.874, 0.821, 0.922),
            "recall@1": interval(0.814, 0.743, 0.885),
            "recall@10": interval(0.982, 0.956, 1.0),
            "recall@3": interval(0.929, 0.876, 0.973),
            "recall@5": interval(0.947, 0.903, 0.982),
        },
        "break_even": [
            {"arm": "ft", "against": "rag", "answers": 4620.4},
            {"arm": "rag+ft", "against": "rag", "answers": 11464},
            {"arm": "rag+ft", "against": "base", "answers": None},
        ],
        "examples": _examples(),
        "config": {
            "workspace": "workspace",
            "seed": 0,
            "corpus": {"path": "data/space/documents", "strict": False},
            "queries": {"path": "data/space/questions.jsonl", "split": "test"},
            "encoder": {"model": "all-MiniLM-L6-v2", "precision": "auto"},
            "retrieval": {"mode": "hybrid", "top_k": 5, "candidates": 50},
            "generator": {"model": "SmolLM2-135M-Instruct", "max_new_tokens": 48},
            "evaluate": {"arms": ["base", "rag", "ft", "rag+ft"], "cutoffs": [1, 3, 5, 10], "resamples": 10000},
        },
        "command": "ragtune compare configs/space.yaml generator.max_new_tokens=48",
        "versions": {
            "ragtune-ray": "0.1.0",
            "python": "3.11.7",
            "torch": "2.10.0",
            "transformers": "5.3.0",
            "ray": "2.60.0",
        },
        "hardware": {"cpu": "Intel Xeon Platinum 8481C", "cores": 2, "memory_bytes": 8_340_000_000, "gpus": []},
        "created": "2026-11-26T12:00:00Z",
        "seconds": {"answer": 151.2, "latency": 37.4, "freshness": 8.9, "total": 200.1},
    }
    return json.loads(json.dumps(value))  # a deep copy, so that a test can change each part by itself


def contested() -> dict[str, Any]:
    """By contains-answer, rag is ahead of rag+ft, which token F1 recommends; two questions show it."""
    value = comparison()
    for arm, rouge in zip(("base", "rag", "ft", "rag+ft"), (0.04, 0.15, 0.1, 0.57), strict=True):
        value["arms"][arm]["quality"]["ROUGE_L"] = interval(rouge, rouge - 0.03, rouge + 0.03)

    value["arms"]["rag"]["quality"]["contains_answer"] = interval(0.637, 0.549, 0.726)
    value["arms"]["rag+ft"]["quality"]["contains_answer"] = interval(0.487, 0.398, 0.575)

    def answer(text: str, score: float, other: float) -> dict[str, Any]:
        return {"text": text, "score": score, "other": other}

    value["contested"] = [
        {
            "metric": "contains_answer",
            "arm": "rag",
            "score": 0.637,
            "against": "rag+ft",
            "against_score": 0.487,
            "low": 0.062,
            "high": 0.238,
            "n": 113,
            "questions": [
                {
                    "query_id": "huygens-3",
                    "query": "On which moon of Saturn did the probe Huygens land in January 2005, after seven years in space?",
                    "gold": ["Titan", "the moon Titan"],
                    "answers": {
                        "rag+ft": answer("on the moon Titania", 0.67, 0.0),
                        "rag": answer(
                            "After a long journey, the probe landed on Titan, " * 12 + "its largest moon.", 0.02, 1.0
                        ),
                    },
                },
                {
                    "query_id": "dawn-1",
                    "query": "Welche Sonde erreichte Ceres?",
                    "gold": ["Dawn"],
                    "answers": {"rag+ft": answer("", 0.0, 0.0), "rag": answer("It was Dawn [1].", 0.5, 1.0)},
                },
            ],
        }
    ]
    return json.loads(json.dumps(value))


def searched() -> dict[str, Any]:
    """Three variants of retrieval were tried; `long` won."""
    value = comparison()
    value["variants"] = {
        "winner": "long",
        "questions": 80,
        "looks": 6,
        "variants": {
            "config": {"settings": {}, "score": interval(0.2, 0.1, 0.3, 80)},
            "dense": {"settings": {"retrieval.mode": "dense"}, "score": interval(0.1, 0.05, 0.15, 40)},
            "few": {"settings": {"retrieval.top_k": 1}, "score": interval(0.15, 0.1, 0.2, 40)},
            "long": {
                "settings": {"retrieval.top_k": 10, "chunking.size_tokens": 400},
                "score": interval(0.25, 0.15, 0.35, 80),
                "workspace": "workspace/variants/long",
            },
        },
        "rounds": [
            {
                "questions": 40,
                "scores": {"config": 0.2, "dense": 0.1, "few": 0.15, "long": 0.2},
                "kept": ["config", "long"],
            },
            {"questions": 80, "scores": {"config": 0.2, "long": 0.25}, "kept": ["long"]},
        ],
    }
    return value


def half_failed() -> dict[str, Any]:
    """More than half of the rows of rag failed, all of rag+ft; no prices are set; all differences are inconclusive."""
    value = comparison()
    value["verdict"] |= {
        "outcome": "no_difference",
        "arm": "base",
        "headline": "No difference was seen; base is the cheapest.",
        "reason": ["Over 113 questions no interval of a difference leaves out 0."],
        "warnings": ["rag failed on 60 of 119 questions.", "rag+ft failed on all questions."],
    }
    value["arms"]["rag"]["statuses"] = {"ok": 59, "failed": 60}
    value["arms"]["rag"]["losses"] = {"correct": 20, "not_retrieved": 6, "misread": 25, "abstained": 5, "failed": 57}
    value["arms"]["rag"]["violations"] = [
        "60 of 119 answers failed",
        "p95 latency 1.03 s is over compare.max_p95_seconds=1",
    ]
    value["arms"]["rag+ft"] |= {
        "statuses": {"ok": 0, "failed": 119},
        "quality": {},
        "explainability": {},
        "latency": None,
    }
    value["arms"]["rag+ft"] |= {
        "throughput": None,
        "losses": {"failed": 113},
        "violations": ["119 of 119 answers failed"],
    }
    for arm in value["arms"].values():
        arm["cost"] = {name: cost * 1e5 if isinstance(cost, float) else cost for name, cost in arm["cost"].items()}
        arm["cost"]["unit"] = "core-seconds"
    value["differences"] = [
        each | {"value": 0.001, "low": -0.012, "high": 0.014, "p_value": 0.8, "p_adjusted": 1.0, "needed": 12_345}
        for each in value["differences"]
        if each["arm"] != "rag+ft"
    ]
    return value


def one_question() -> dict[str, Any]:
    """One arm, one question, nothing optional: no qrels, no freshness, no forgetting, no prices."""
    value = comparison()
    arm = value["arms"]["base"]
    arm["quality"] = {"EM": interval(0.0, 0.0, 0.0, 1), "token_F1": interval(0.0, 0.0, 0.0, 1)}
    arm["explainability"] = {}
    arm |= {"statuses": {"ok": 1}, "losses": {"correct": 0, "abstained": 0, "wrong": 1, "failed": 0}}
    arm["cost"] = dict.fromkeys(("index", "training", "one_off", "per_1000", "total"), 0.0)
    arm["cost"] |= {"answers": 1, "unit": "core-seconds"}
    value["verdict"] = {
        "outcome": "too_few_questions",
        "arm": "base",
        "headline": "Too few questions to choose: 1, about 340 are needed.",
        "reason": ["One question says nothing about the next."],
        "warnings": [],
        "weighed": [],
    }
    value["questions"] = {"total": 1, "answerable": 1, "unanswerable": 0, "needed": 340}
    for name in ("freshness", "forgetting"):
        del arm[name]
    for name in ("retrieval", "ceilings", "differences", "break_even", "examples"):
        del value[name]
    return value | {"arms": {"base": arm}}


MARKUP = "</title></style></pre><script>document.title='taken'</script><img src=http://evil.test/x onerror=alert(1)>"
OVERRIDE = "\N{RIGHT-TO-LEFT OVERRIDE}gnirts neddih\N{HEBREW LETTER ALEF}"
CHINESE = "嫦娥四号在月球背面着陆，这是人类历史上的第一次。"
UNBROKEN = "x" * 5000


def hostile() -> dict[str, Any]:
    """Markup, scripts, right-to-left text, control characters, 5,000 characters without a space and Chinese in every text."""
    value = comparison()
    value["title"] = MARKUP
    value["verdict"]["reason"] += [MARKUP, OVERRIDE]
    value["verdict"]["warnings"] += [UNBROKEN[:300], "bell \x07, escape \x1b[31m, half a pair \ud83d"]
    value["verdict"]["weighed"][0] |= {"rule": MARKUP, "result": UNBROKEN[:200]}
    value["arms"]["ft"] |= {"model": MARKUP, "violations": [MARKUP, CHINESE]}
    value["ceilings"] = {MARKUP: value["ceilings"]["tuned model"]}
    value["config"]["prompt"] = {"system": MARKUP, "system_without_passages": CHINESE}
    value["command"] = f"ragtune compare configs/space.yaml 'prompt.system={MARKUP}' {UNBROKEN[:300]}"
    value["versions"][MARKUP] = "{{ 7 * 7 }}"
    for text in (MARKUP, OVERRIDE, CHINESE * 250, UNBROKEN):
        source = SOURCES[0] | {"title": text[:400], "document_id": text[:400], "text": text}
        answers = {
            "base": answer("", 0.0),
            "rag": answer(text, 0.0, [source, source | {"number": 2, "cited": False}]),
            "ft": answer("", 0.0, status="failed", error=text[:600]),
            "rag+ft": answer(f"{{{{ {text} }}}}", 1.0, [source]),
        }
        value["examples"].append({"query_id": text[:300], "query": text, "gold": [text[:500]], "answers": answers})
    return value


def judged_comparison(
    settings_for: Any, stub: Any, folder: Path, num_questions: int, reply: Callable[[str], str], *overrides: str
) -> tuple[config.Config, list[str]]:
    """A comparison of base and rag by a judge, on questions without gold answers, and what its server is asked.

    The server `stub` is generator and judge; `reply` answers the text of a request.
    """
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{n}", "text": f"What is {n}?"}) + "\n" for n in range(num_questions)))
    asked: list[str] = []
    stub.reply = lambda content: (asked.append(content), reply(content))[1]
    settings = settings_for(
        folder / "workspace",
        f"queries.path={path}",
        "generator.engine=openai",
        "generator.model=g",
        f"generator.base_url={stub.url}",
        "compare.arms=[base, rag]",
        "compare.latency_queries=1",
        "compare.metric=judge",
        f"evaluate.judge={{model: j, base_url: '{stub.url}'}}",
        "cluster.generator_workers=1",
        *overrides,
    )
    return settings, asked
