"""`/v1/documents` over a fake backend: what is refused, ids, paging, and what each key may list."""

import json
from typing import Any

import httpx2 as httpx
import pytest

from ragtune_ray.index import filters
from ragtune_ray.ingest import rows
from ragtune_ray.serving.backend import Failed
from tests.support.gateways import FakeBackend, bearer, client, keys

pytestmark = pytest.mark.anyio

PATH = "/v1/documents"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("name", ["document_id", "_id", "id"])
@pytest.mark.parametrize(("given", "kept"), [("d9", "d9"), (7, "7"), ("\ufeffa\r\nb", "a\nb")])
async def test_documents_are_rows_as_in_files(name: str, given: Any, kept: str) -> None:
    async with client() as http:
        reply = await http.post(
            PATH, json={"documents": [{name: given, "text": "New.", "title": " A \n b", "metadata": None}]}
        )
        assert reply.json() == {"index_version": "000008"}
        ((_, change),) = http.backend.asked
        assert change.upserted == ({"document_id": kept, "text": "New.", "title": "A b", "metadata": {}},)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"id": "b", "text": "x", "metadata": {"x": 1e999}}', "metadata cannot be written as JSON"),
        ('{"id": " \\n", "text": "x"}', "document_id is empty"),
        ('{"id": "b", "text": " "}', "empty document"),
        ('{"id": "a", "text": "other"}', "an earlier document of this request has the same id"),
        ('{"id": "a\\u0000", "text": "x"}', "NUL"),
        ('{"id": "b", "text": "' + "x" * 101 + '"}', "101 bytes is longer than max_document_bytes"),
        ('{"id": "' + "b" * 4097 + '", "text": "x"}', "4,097 characters; the limit is 4,096"),
        ('{"id": "\\ud800", "text": "x"}', "a lone surrogate"),
    ],
)
async def test_a_refused_document_is_named_and_nothing_is_changed(row: str, reason: str) -> None:
    body = f'{{"documents": [{{"id": "a", "text": "x"}}, {row}, {{"id": "c", "text": ""}}]}}'
    async with client("corpus.max_document_bytes=100") as http:
        reply = await http.post(PATH, content=body, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "documents_rejected")
        assert "2 of 3 refused, so nothing was changed; number 2: " in reply.json()["error"]["message"]
        first, second = reply.json()["rejected"]
        assert reason in first["reason"]
        assert (first["number"], second) == (2, {"number": 3, "document_id": "c", "reason": "empty document"})
        assert http.backend.asked == []


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x"},
        {"id": "a"},
        {"id": True, "text": "x"},
        {"id": 1.5, "text": "x"},
        {"id": "a", "_id": "b", "text": "x"},
        {"id": "a", "text": "x", "year": 1877},
        {"id": "a", "text": "x", "metadata": "{}"},
    ],
)
async def test_a_document_of_another_shape_is_refused_by_its_field(row: dict[str, Any]) -> None:
    async with client() as http:
        reply = await http.post(PATH, json={"documents": [row]})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith("documents.0")
        assert http.backend.asked == []


async def test_a_document_must_name_its_tenant() -> None:
    async with client("index.tenant_field=owner", keys=keys(user="a", other="b")) as http:
        for metadata in ({}, {"owner": ""}, {"owner": " "}, {"owner": 1}, {"owner": []}, {"owner": ["a", " "]}):
            body = {"documents": [{"id": "a", "text": "x", "metadata": metadata}]}
            reply = await http.post(PATH, json=body, headers=bearer("admin"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "tenant_missing")
            assert reply.json()["rejected"][0]["reason"] == (
                "no tenant: metadata must name it as text in 'owner' (index.tenant_field)"
            )
        body = {"documents": [{"id": "a", "text": "x", "metadata": {"owner": ["a", "b"]}}]}
        assert (await http.post(PATH, json=body, headers=bearer("admin"))).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("DELETE", PATH), ("POST", f"{PATH}/delete")])
async def test_ids_to_delete_are_cleaned_as_those_of_documents_are(method: str, path: str) -> None:
    async with client() as http:
        await http.request(method, path, json={"document_ids": ["\ufeffa\r\nb", "a\nb", 7]})
        ((_, change),) = http.backend.asked
        assert change.deleted == ("a\nb", "7")
        for ids in ([], ["a", " "], ["\ufeff"], [None], [True], ["x" * 4097]):
            reply = await http.request(method, path, json={"document_ids": ids})
            assert (reply.status_code, reply.json()["error"]["param"][:12]) == (400, "document_ids"), ids
        assert len(http.backend.asked) == 1


async def test_a_change_that_fails_later_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FakeBackend):
        async def change_documents(self, change, seconds):
            raise Failed(507, "nothing was changed: the disk of the index is full", "no_space").error()

    async with client(backend=Full()) as http:
        reply = await http.post(PATH, json={"documents": [{"id": "a", "text": "x"}]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (507, "no_space")


async def test_documents_are_listed_page_by_page() -> None:
    async with client() as http:
        page = (await http.get(PATH, params={"limit": 2})).json()
        assert page == {
            "object": "list",
            "data": [
                {
                    "object": "document",
                    "document_id": f"d{number}",
                    "title": f"Vessel {number}",
                    "metadata": {"year": 2020},
                    "num_passages": 1,
                }
                for number in range(2)
            ],
            "first_id": "d0",
            "last_id": "d1",
            "has_more": True,
            "index_version": "000007",
        }
        rest = (await http.get(PATH, params={"after": page["last_id"]})).json()
        assert ([row["document_id"] for row in rest["data"]], rest["has_more"]) == (["d2"], False)
        empty = (await http.get(PATH, params={"after": "d2"})).json()
        assert (empty["data"], empty["last_id"], empty["has_more"]) == ([], None, False)
        assert [asked[3] for asked in http.backend.asked] == [2, 100, 100]
        longest = "\U0001f30d" * rows.MAX_ID_CHARACTERS
        assert (await http.get(PATH, params={"after": longest})).status_code == 200
        assert (await http.request("DELETE", PATH, json={"document_ids": [longest]})).status_code == 200
        assert len(str(httpx.URL(PATH, params={"after": longest}))) < 2**16
        for wrong in (
            {"limit": 0},
            {"limit": 1001},
            {"limit": "x"},
            {"limit": "0000000011000000"},
            {"limit": "000000001" + "9" * 5000},
            {"page": 2},
            {"filter": "x"},
            {"filter": "[]"},
            {"after": "x\0"},
            {"after": "x" * 4097},
        ):
            reply = await http.get(PATH, params=wrong)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(wrong))), wrong


async def test_a_key_lists_what_it_may_search_and_an_admin_key_everything() -> None:
    settings = ("index.tenant_field=owner", "retrieval.filter={year: 2020}")
    async with client(*settings, keys=keys(user="a", other="b")) as http:

        async def listed(name: str, **chosen: Any) -> filters.Filter:
            reply = await http.get(PATH, params={"filter": json.dumps(chosen)}, headers=bearer(name))
            assert reply.status_code == 200
            return http.backend.asked[-1][1]

        for name, tenant in (("user", "a"), ("other", "b")):
            for chosen in ({}, {"owner": "b"}, {"year": {"gte": 2000}}):
                expected = [filters.parse_filter({"year": 2020}), filters.tenant_filter("owner", tenant)]
                assert await listed(name, **chosen) == filters.combine(*expected, filters.parse_filter(chosen))
        assert await listed("admin") == filters.Filter()
        assert await listed("admin", owner="b") == filters.parse_filter({"owner": "b"})
        assert (await http.get(PATH)).status_code == 401


async def test_listing_counts_as_work() -> None:
    async with client() as http:
        http.middleware.routes["GET", PATH].load.capacity = 0
        assert (await http.get(PATH)).status_code == 429
        http.middleware.draining = True
        assert (await http.get(PATH)).status_code == 503
