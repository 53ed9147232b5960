"""LangChain against an endpoint: `python langchain_client.py ADDRESS`."""

import sys


def main(address: str) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    reached = {"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0}
    question = HumanMessage("What is the code of vessel0?")
    for api in (False, True):  # chat completions, responses
        chat = ChatOpenAI(model="rag", use_responses_api=api, **reached)
        answer = chat.invoke([question])
        assert answer.text == "It is secret0.", answer
        assert answer.usage_metadata["total_tokens"] == 16, answer
        again = chat.invoke([question, answer, HumanMessage("And of vessel1?")])
        assert again.text == "It is secret0.", again
        pieces = list(chat.stream([question]))
        assert "".join(piece.text for piece in pieces) == "It is secret0.", pieces
        assert len(pieces) > 3, pieces
    narrowed = ChatOpenAI(
        model="base", extra_body={"top_k": 1}, temperature=0.3, max_tokens=100_000, n=2, stop=["END"], **reached
    )
    assert len(narrowed.generate([[question]]).generations[0]) == 2
    text = OpenAI(model="rag", **reached)
    assert text.invoke("What is the code of vessel0?") == "It is secret0."
    assert text.batch(["What is the code of vessel0?", "And of vessel1?"]) == ["It is secret0."] * 2

    by_default = OpenAIEmbeddings(model="all-MiniLM-L6-v2", check_embedding_ctx_length=False, **reached)
    assert by_default.embed_documents(["a", "b"]) == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert by_default.embed_query("a") == [1, 0, 0, 0]


if __name__ == "__main__":
    main(sys.argv[1])
