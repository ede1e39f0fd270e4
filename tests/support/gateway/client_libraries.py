"""What each client library asks of a gateway. Run with a Python that has them: ``client_libraries.py URL MODEL``.

Prints a line of JSON: each check by name with "ok", or what went wrong. That text is noise does not matter; that each
library can read its answer does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import instructor
import litellm
import openai
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

TOKENS = 600
FEW = 24
"""Tokens of text, which needs no end."""
THREADS = 8
SAY: Any = [{"role": "user", "content": "Order three apples, as JSON."}]
CHECKS: dict[str, Callable[[str, str], None]] = {}


class Item(BaseModel):
    name: str
    count: int = Field(ge=1, le=12)
    kind: Literal["fruit", "tool"] | None = None


class Order(BaseModel):
    """An order."""

    id: int
    items: list[Item]


def weather(city: str, days: int = 1) -> str:
    """The weather in a city."""
    return f"sunny in {city} for {days} days"


def check(run: Callable[[str, str], None]) -> Callable[[str, str], None]:
    CHECKS[run.__name__] = run
    return run


# -- openai ------------------------------------------------------------------------------------------------------


def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


@check
def openai_parse(url: str, model: str) -> None:
    answer = sdk(url).chat.completions.parse(model=model, messages=SAY, response_format=Order, max_tokens=TOKENS)
    assert isinstance(answer.choices[0].message.parsed, Order)


@check
def openai_parse_tools(url: str, model: str) -> None:
    answer = sdk(url).chat.completions.parse(
        model=model, messages=SAY, tools=[openai.pydantic_function_tool(Order)], tool_choice="required",
        max_tokens=TOKENS,
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Order)


@check
def openai_stream_tools(url: str, model: str) -> None:
    with sdk(url).chat.completions.stream(
        model=model, messages=SAY, tools=[openai.pydantic_function_tool(Order)], tool_choice="required",
        max_tokens=TOKENS,
    ) as events:  # fmt: skip
        assert "tool_calls.function.arguments.done" in {event.type for event in events}


# -- LangChain ---------------------------------------------------------------------------------------------------


def chat(url: str, model: str, **more: Any) -> ChatOpenAI:
    options = {"max_tokens": TOKENS, "max_retries": 0, "timeout": 120} | more
    return ChatOpenAI(base_url=url, api_key="none", model=model, **options)


@check
def langchain_chat(url: str, model: str) -> None:
    few = chat(url, model, max_tokens=FEW)
    assert few.invoke("hi").usage_metadata["output_tokens"] > 0
    assert len(list(few.stream("hi"))) > 1
    assert len(few.batch(["a", "b", "c"])) == 3


@check
def langchain_n(url: str, model: str) -> None:
    assert len(chat(url, model, n=3, max_tokens=FEW).generate([[HumanMessage("hi")]]).generations[0]) == 3


@check
def langchain_logprobs(url: str, model: str) -> None:
    assert chat(url, model, max_tokens=FEW).bind(logprobs=True).invoke("hi").response_metadata["logprobs"]["content"]


@check
def langchain_tool_choice(url: str, model: str) -> None:
    bound = chat(url, model).bind_tools([tool(weather)], tool_choice="any")
    assert bound.invoke("hi").tool_calls[0]["name"] == "weather"
    chunks = list(bound.stream("hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole.tool_calls[0]["args"]["city"], str)


@check
def langchain_tools_by_themselves(url: str, model: str) -> None:
    assert chat(url, model).bind_tools([tool(weather)]).invoke("hi").tool_calls


@check
def langchain_structured_json_schema(url: str, model: str) -> None:
    assert isinstance(chat(url, model).with_structured_output(Order, method="json_schema").invoke("hi"), Order)


@check
def langchain_structured_function(url: str, model: str) -> None:
    assert isinstance(chat(url, model).with_structured_output(Order, method="function_calling").invoke("hi"), Order)


@check
def langchain_structured_json_mode(url: str, model: str) -> None:
    """Without a schema to keep: the model would have to read it in the prompt."""
    form = {"title": "any", "type": "object"}
    assert isinstance(chat(url, model).with_structured_output(form, method="json_mode").invoke("JSON"), dict)


@check
def langchain_agent_ends(url: str, model: str) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "What is the weather?"}]}
    turns = create_agent(chat(url, model), [tool(weather)]).invoke(asked)["messages"]
    assert isinstance(turns[-1], AIMessage)
    assert not turns[-1].tool_calls


@check
def langchain_agent_calls_a_tool(url: str, model: str) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "What is the weather?"}]}
    turns = create_agent(chat(url, model), [tool(weather)]).invoke(asked)["messages"]
    assert any(isinstance(turn, ToolMessage) for turn in turns)


@check
def langchain_agent_structured(url: str, model: str) -> None:
    agent = create_agent(chat(url, model), [tool(weather)], response_format=ProviderStrategy(Order))
    assert isinstance(agent.invoke({"messages": [{"role": "user", "content": "Order."}]})["structured_response"], Order)


@check
def langchain_completions_of_several_prompts(url: str, model: str) -> None:
    llm = OpenAI(base_url=url, api_key="none", model=model, max_retries=0, max_tokens=9, n=2, best_of=2)
    assert [len(found) for found in llm.generate(["a", "b", "c"]).generations] == [2, 2, 2]


# -- LlamaIndex --------------------------------------------------------------------------------------------------


def llama(url: str, model: str, **more: Any) -> OpenAILike:
    options = {
        "is_chat_model": True, "is_function_calling_model": True, "context_window": 4096, "max_tokens": TOKENS,
        "max_retries": 0, "timeout": 120.0,
    } | more  # fmt: skip
    return OpenAILike(model=model, api_base=url, api_key="none", **options)


@check
def llamaindex_chat(url: str, model: str) -> None:
    say, llm = [ChatMessage(role="user", content="hi")], llama(url, model, max_tokens=FEW)
    assert llm.chat(say).message.content is not None
    assert list(llm.stream_chat(say))
    assert llama(url, model, is_chat_model=False, max_tokens=FEW).complete("hi").text


@check
def llamaindex_alternatives(url: str, model: str) -> None:
    llm = llama(url, model, logprobs=True, top_logprobs=2, max_tokens=FEW)
    assert llm.chat([ChatMessage(role="user", content="hi")]).logprobs


@check
def llamaindex_structured_json_schema(url: str, model: str) -> None:
    llm = llama(url, model, should_use_structured_outputs=True)
    assert isinstance(llm.structured_predict(Order, PromptTemplate("order")), Order)


@check
def llamaindex_structured_function(url: str, model: str) -> None:
    assert isinstance(llama(url, model).as_structured_llm(Order).complete("order").raw, Order)


@check
def llamaindex_tool_required(url: str, model: str) -> None:
    llm, tools = llama(url, model), [FunctionTool.from_defaults(weather)]
    answer = llm.chat_with_tools(tools, user_msg="hi", tool_required=True)
    assert llm.get_tool_calls_from_response(answer)[0].tool_name == "weather"


@check
def llamaindex_agent_ends(url: str, model: str) -> None:
    async def run() -> str:
        return str(await FunctionAgent(tools=[weather], llm=llama(url, model)).run("What is the weather?"))

    assert asyncio.run(run()) is not None


# -- instructor --------------------------------------------------------------------------------------------------


def instruct(url: str, model: str, mode: instructor.Mode, form: Any = Order) -> Any:
    client = instructor.from_openai(sdk(url), mode=mode)
    return client.chat.completions.create(
        model=model, messages=SAY, response_model=form, max_retries=0, max_tokens=TOKENS
    )


@check
def instructor_tools(url: str, model: str) -> None:
    assert isinstance(instruct(url, model, instructor.Mode.TOOLS), Order)


@check
def instructor_tools_strict(url: str, model: str) -> None:
    assert isinstance(instruct(url, model, instructor.Mode.TOOLS_STRICT), Order)


@check
def instructor_json_schema(url: str, model: str) -> None:
    assert isinstance(instruct(url, model, instructor.Mode.JSON_SCHEMA), Order)


@check
def instructor_json(url: str, model: str) -> None:
    assert isinstance(instruct(url, model, instructor.Mode.JSON), Order)


@check
def instructor_markdown_json(url: str, model: str) -> None:
    assert isinstance(instruct(url, model, instructor.Mode.MD_JSON), Order)


@check
def instructor_parallel_tools(url: str, model: str) -> None:
    assert list(instruct(url, model, instructor.Mode.PARALLEL_TOOLS, Iterable[Item | Order]))


@check
def instructor_partial(url: str, model: str) -> None:
    client = instructor.from_openai(sdk(url), mode=instructor.Mode.TOOLS)
    parts = list(
        client.chat.completions.create_partial(
            model=model, messages=SAY, response_model=Order, max_retries=0, max_tokens=TOKENS
        )
    )
    assert isinstance(parts[-1].id, int)


# -- LiteLLM -----------------------------------------------------------------------------------------------------


def lite(url: str, model: str, **more: Any) -> Any:
    options = {"messages": SAY, "max_tokens": TOKENS, "num_retries": 0, "timeout": 120} | more
    return litellm.completion(model=f"openai/{model}", api_base=url, api_key="none", **options)


@check
def litellm_n_and_logprobs(url: str, model: str) -> None:
    answer = lite(url, model, n=2, logprobs=True, max_tokens=FEW)
    assert [bool(choice.logprobs.content) for choice in answer.choices] == [True, True]


@check
def litellm_json_schema(url: str, model: str) -> None:
    Order.model_validate_json(lite(url, model, response_format=Order).choices[0].message.content)


@check
def litellm_tools(url: str, model: str) -> None:
    tools = {"tools": [openai.pydantic_function_tool(Order)], "tool_choice": "required"}
    Order.model_validate_json(lite(url, model, **tools).choices[0].message.tool_calls[0].function.arguments)
    streamed = litellm.stream_chunk_builder(list(lite(url, model, stream=True, **tools)))
    Order.model_validate_json(streamed.choices[0].message.tool_calls[0].function.arguments)


@check
def litellm_several_prompts(url: str, model: str) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{model}", api_base=url, api_key="none", prompt=["a", "b"], n=2, max_tokens=9
    )
    assert len(answer.choices) == 4


def main(url: str, model: str) -> None:
    def outcome(run: Callable[[str, str], None]) -> str:
        try:
            run(url, model)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:500]
        return "ok"

    # The demo's engines are slow on purpose, and have room for many.
    with ThreadPoolExecutor(THREADS) as pool:
        print(json.dumps(dict(zip(CHECKS, pool.map(outcome, CHECKS.values()), strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
