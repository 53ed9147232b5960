"""LlamaIndex against an endpoint: `python llama_index_client.py ADDRESS`."""

import sys


def main(address: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike

    reached = {"api_base": f"{address}/v1", "api_key": "none", "max_retries": 0}
    question = ChatMessage(role="user", content="What is the code of vessel0?")
    for is_chat in (True, False):
        model = OpenAILike(model="rag", is_chat_model=is_chat, **reached)
        assert model.complete("What is the code of vessel0?").text == "It is secret0."
        pieces = [piece.delta for piece in model.stream_complete("What is the code of vessel0?")]
        assert "".join(piece or "" for piece in pieces) == "It is secret0.", pieces
    model = OpenAILike(model="rag", is_chat_model=True, **reached)
    answer = model.chat([question]).message
    assert answer.content == "It is secret0."
    again = model.chat([question, answer, ChatMessage(role="user", content="And of vessel1?")])
    assert again.message.content == "It is secret0."
    *_, last = model.stream_chat([question])
    assert last.message.content == "It is secret0."

    vectors = OpenAILikeEmbedding(model_name="all-MiniLM-L6-v2", embed_batch_size=2048, **reached)
    assert vectors.get_text_embedding_batch(["a", "b"]) == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert vectors.get_query_embedding("a") == [1, 0, 0, 0]


if __name__ == "__main__":
    main(sys.argv[1])
