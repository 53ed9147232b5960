"""LiteLLM against an endpoint: `python litellm_client.py ADDRESS`."""

import sys


def main(address: str) -> None:
    import litellm

    reached = {"api_base": f"{address}/v1", "api_key": "none", "num_retries": 0}
    messages = [{"role": "user", "content": "What is the code of vessel0?"}]
    answer = litellm.completion(model="openai/rag", messages=messages, **reached)
    assert answer.choices[0].message.content == "It is secret0.", answer
    more = {"role": "user", "content": "And of vessel1?"}
    for said in (answer.choices[0].message, answer.choices[0].message.model_dump()):
        again = litellm.completion(model="openai/rag", messages=[*messages, said, more], top_k=1, **reached)
        assert again.choices[0].message.content == "It is secret0.", again
    pieces = litellm.completion(model="openai/rag", messages=messages, stream=True, **reached)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "It is secret0."
    text = litellm.text_completion(model="text-completion-openai/rag", prompt=messages[0]["content"], **reached)
    assert text.choices[0].text == "It is secret0.", text
    response = litellm.responses(model="openai/rag", input=messages[0]["content"], **reached)
    assert response.output[0].content[0].text == "It is secret0.", response
    *_, last = litellm.responses(model="openai/rag", input=messages[0]["content"], stream=True, **reached)
    assert last.type == "response.completed", last
    assert last.response.output[0].content[0].text == "It is secret0.", last
    vectors = litellm.embedding(model="openai/all-MiniLM-L6-v2", input=["a", "b"], **reached)
    assert [row["embedding"] for row in vectors.data] == [[1, 0, 0, 0], [0, 1, 0, 0]], vectors


if __name__ == "__main__":
    main(sys.argv[1])
