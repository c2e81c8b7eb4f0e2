"""Programs as users write them: each returns what a test can compare between backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sgl

CHARACTER = (
    r"\{\n"
    r'    "name": "[\w\d\s]{1,16}",\n'
    r'    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",\n'
    r'    "alive": "(Alive|Deceased)"\n'
    r"\}"
)
PROGRAMS: dict[str, tuple[Any, dict[str, Any]]] = {}


def program(**arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Notes a program, and what it is run with."""

    def note(body: Callable[..., Any]) -> Any:
        made = sgl.function(body)
        PROGRAMS[body.__name__] = made, arguments
        return made

    return note


@program(country="Germany")
def multi_turn(s, country):
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(f"What is the capital of {country}?")
    s += sgl.assistant(sgl.gen("capital", max_tokens=24))
    s += sgl.user("Name an interesting building in this city.")
    s += sgl.assistant(sgl.gen("building", max_tokens=24))


@program(question="What is the main difference between a CPU and a GPU?")
def control_flow(s, question):
    s += sgl.user(question)
    s += sgl.assistant(
        "Based on the question, this seems like "
        + sgl.gen("type", choices=["a technical query", "a creative request"])
    )
    if s["type"] == "a technical query":
        s += sgl.assistant("Here's a technical explanation: " + sgl.gen("said", max_tokens=16))
    else:
        s += sgl.assistant("Here's a creative response: " + sgl.gen("said", max_tokens=16))


@program(question="What is 7 times 9?")
def tool_use(s, question):
    s += "To answer this question: " + question + ". "
    s += "I need to use a " + sgl.gen("tool", choices=["calculator", "search engine"]) + ". "
    if s["tool"] == "calculator":
        s += "The math expression is" + sgl.gen("expression", max_tokens=12)
    elif s["tool"] == "search engine":
        s += "The key word to search is" + sgl.gen("word", max_tokens=12)


@program()
def tip_suggestion(s):
    s += "Here are two tips for staying healthy: 1. Balanced Diet. 2. Regular Exercise.\n\n"
    forks = s.fork(2)
    for i, f in enumerate(forks):
        f += f"Now, expand tip {i + 1} into a paragraph:\n"
        f += sgl.gen("detailed_tip", max_tokens=24, stop="\n\n")
    s += "Tip 1:" + forks[0]["detailed_tip"] + "\n"
    s += "Tip 2:" + forks[1]["detailed_tip"] + "\n"
    s += "In summary" + sgl.gen("summary", max_tokens=16)


@program(question="What does the integral of sin(x) from 0 to 2pi evaluate to?", n=3)
def parallel_sample(s, question, n):
    s += sgl.user(question)
    forks = s.fork(n)
    forks += sgl.assistant(sgl.gen("answer", max_tokens=12))
    forks.join()


@program()
def birth_date(s):
    s += sgl.user("What is the birth date of Albert Einstein?")
    s += sgl.assistant(sgl.gen("answer", regex=r"\d{1,2}\/\d{1,2}\/\d{2,4}"))


@program(name="Harry Potter")
def character(s, name):
    s += name + " is a character in Harry Potter. Please fill in the information.\n"
    s += sgl.gen("json_output", max_tokens=128, regex=CHARACTER)


@program(question="What is the capital of France?")
def text_qa(s, question):
    s += "Q: " + question + "\n"
    s += "A:" + sgl.gen("answer", stop="\n", max_tokens=32)


@program()
def roles(s):
    s += sgl.system("You talk like a pirate.")
    s += sgl.user_begin()
    s += "Hello, how do you like life as a pirate?"
    s += sgl.user_end()
    s += sgl.assistant_begin()
    s += "There is much to tell about the life of a pirate." + sgl.gen("story", max_tokens=16)
    s += sgl.assistant_end()


@program()
def role_scopes(s):
    s += sgl.system("You are a helpful assistant.")
    with s.user():
        s += "Question: What is the capital of France?"
    s += sgl.assistant_begin()
    s += "Answer: " + sgl.gen(max_tokens=24, stop="\n")
    s += sgl.assistant_end()


@program()
def types(s):
    s += "Seven times eight is " + sgl.gen_int("number", max_tokens=8)
    s += " and pi is about " + sgl.gen("pi", dtype=float, max_tokens=8)
    s += ". Is that right? " + sgl.gen("right", dtype=bool)
    s += ". My name is " + sgl.gen_string("name", max_tokens=12)


@program()
def schema(s):
    s += sgl.user("Describe Paris in JSON.")
    shape = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    s += sgl.assistant(sgl.gen("json", json_schema=shape, max_tokens=48))


@program()
def scopes_and_copies(s):
    with s.var_scope("first"):
        s += "One, two," + sgl.gen(max_tokens=6)
    with s.copy() as c:
        c += " and then" + sgl.gen("then", max_tokens=6)
        s["then"] = c["then"]
    s += " or" + sgl.gen("end", max_tokens=6)


@program()
def nested_forks(s):
    s += "The best animals are"
    outer = s.fork(2)
    for i, one in enumerate(outer):
        one += [" cats" if i == 0 else " dogs", sgl.gen("why", max_tokens=4)]
        inner = one.fork(2)
        inner += lambda j: f" ({j})" + sgl.gen("more", max_tokens=4)
        inner.join()
    outer.join()


@program()
def appended(s):
    s += "Planets: "
    copies = s.fork(2)
    copies += lambda i: f"{i}." + sgl.gen(max_tokens=4) + ";"
    copies.join("concate_and_append")
    s += " Stars:" + sgl.gen("stars", max_tokens=4)


@program()
def unicode_text(s):
    s += "Übersetze: 「猫」 heißt auf Deutsch „" + sgl.select("word", ["Katze", "Hund", "Vögel 🐦"])
    s += "“ und 🐶 heißt" + sgl.gen("dog", max_tokens=8)


@program()
def methods(s):
    how = {"choices": [" Paris", " Rome", " a city called Paris"]}
    s += "The capital of France is"
    for name in ("token_length_normalized", "greedy_token_selection"):
        s += sgl.gen(name, choices_method=getattr(sgl, name), **how)
    s += sgl.gen("last", choices_method=sgl.unconditional_likelihood_normalized, **how)


@program(questions=["What is 2 + 2?", "What is the color of the sky?"])
def few_shot_qa(s, questions):
    s += "Q: What is 1 + 1?\nA: 2\nQ: What is the color of grass?\nA: green\n"
    forks = s.fork(len(questions))
    for fork, question in zip(forks, questions, strict=True):
        fork += f"Q: {question}\nA:" + sgl.gen("answer", stop="\n", max_tokens=6)
    return [fork["answer"] for fork in forks]


@program(question="How many days does a leap year have?")
def react(s, question):
    known = {"leap year": "A leap year has 366 days.", "year": "A year has 365 days."}
    s += f"Question: {question}\n"
    for step in range(2):
        s += f"Thought {step + 1}:" + sgl.gen(f"thought_{step}", stop="\n", max_tokens=8) + "\n"
        s += f"Action {step + 1}: " + sgl.select(f"action_{step}", ["Search[leap year]", "Finish"])
        if s[f"action_{step}"] == "Finish":
            break
        s += f"\nObservation {step + 1}: {known['leap year']}\n"
    s += "\nAnswer:" + sgl.gen("answer", stop="\n", max_tokens=6)


@program(question="Is 7 a prime number?")
def tree_of_thought(s, question):
    s += sgl.user(question + " Think in small steps.")
    branches = s.fork(3)
    branches += lambda i: sgl.assistant(f"Step {i + 1}:" + sgl.gen("step", max_tokens=6))
    branches += sgl.user("Is this step right?")
    branches += sgl.assistant(sgl.select("verdict", ["yes", "no"]))
    steps = [branch["step"] for branch in branches]  # all asked for, even where select fails
    return steps, [branch["verdict"] for branch in branches]


@program(essay="I like cats. Cats are good.")
def llm_judge(s, essay):
    s += sgl.system("Evaluate an essay about an image.")
    s += sgl.user("Essay: " + essay)
    forks = s.fork(3)
    for fork, dimension in zip(forks, ["Clarity", "Originality", "Evidence"], strict=True):
        fork += sgl.user(f"Judge its {dimension} in a few words.")
        fork += sgl.assistant("Judgment:" + sgl.gen("judgment", max_tokens=6, stop="END"))
    s += sgl.user("Judgments:" + "\n".join(fork["judgment"] for fork in forks) + " Your grade?")
    s += sgl.assistant(sgl.gen("grade", choices=["A", "B", "C", "D"]))


@program()
def chinese_regex(s):
    s += sgl.user("法国的首都是哪里?") + sgl.assistant(sgl.gen("city", regex="(巴黎|罗马)[。!]"))


@program()
def grammar(s):
    s += "An arithmetic expression: "
    s += sgl.gen("sum", ebnf='start: NUMBER ("+" NUMBER)+ "="\nNUMBER: /[0-9]{1,2}/', max_tokens=16)


@program()
def limits(s):
    s += "Count: one two three" + sgl.gen("longer", min_tokens=6, max_tokens=8, stop=" ")
    s += "\nOnce" + sgl.gen("stopped", stop=[",", ".", "!"], max_tokens=16)
    s += " and" + sgl.gen("none", max_tokens=0) + sgl.gen("more", max_tokens=3)


@program()
def penalties(s):
    s += "ha ha ha ha" + sgl.gen("fresh", frequency_penalty=2.0, max_tokens=6)
    s += " ha ha" + sgl.gen("new", presence_penalty=2.0, max_tokens=6)


@program()
def chain_of_thought(s):
    s += sgl.user("What is 3 + 4?")
    branches = s.fork(2)
    for branch, start in zip(branches, ["The", "To"], strict=True):
        branch += sgl.assistant_begin() + start
        branch += sgl.gen("rest", max_tokens=6, return_logprob=True, top_logprobs_num=2)
        branch += sgl.assistant_end()
    metas = [branch.get_meta_info("rest") for branch in branches]
    return [
        [ids for _, ids, _ in meta["output_token_logprobs"]]
        + [len(top) for top in meta["output_top_logprobs"]]
        for meta in metas
    ]


@program(names=["Ada", "Grace"])
def loops_and_lists(s, names):
    for name in names:
        s += [f"{name} was a ", sgl.gen(f"job_{name}", max_tokens=4), ". "]
    s["all"] = [s[f"job_{name}"] for name in names]
    assert "all" in s


@program(topic="tea")
def parts_of_expressions(s, topic):
    question = sgl.user("One word about " + topic + "?")
    answer = sgl.assistant(sgl.gen("word", max_tokens=3, stop=[".", "\n"]))
    s += question + answer
    s += sgl.user("And its opposite?") + sgl.assistant(sgl.gen("opposite", max_tokens=3))
    return s["word"], s["opposite"]


@program()
def empty_and_early(s):
    s += ""
    s += sgl.user("Hi") + sgl.assistant("")
    s += sgl.user("") + sgl.assistant("Hello" + sgl.gen("end", max_tokens=3))
    if s["end"] is None:
        s += "never"
    return "early"


@program(lines=5)
def line_retrieval(s, lines):
    s += "Below is a record of lines.\n"
    chunks = s.fork(lines)
    chunks += lambda i: f"line {i}: the value is {i * 17}\n"
    chunks.join("concate_and_append")
    s += "The value of line 3 is" + sgl.gen("value", max_tokens=4, stop="\n")


def outcome(state: Any) -> dict[str, Any]:
    """What a program came to."""
    execution = state._execution
    state.sync()
    return {
        "text": state.text(),
        "messages": state.messages(),
        "variables": {name: state[name] for name in execution.variables},
        "returned": state.ret_value,
    }
