"""Tips that are explained side by side, and then summarized together.

`fork` makes copies of the prompt. What the copies have in common is computed once, and they are
answered at the same time. `join` brings their variables back as lists.

Prints each tip with the reason for it, and the summary.
"""

from __future__ import annotations

import argparse

import sgl

TIPS = ["Eat a balanced diet", "Exercise regularly", "Sleep enough"]


@sgl.function
def explain_tips(s: sgl.ProgramState, tips: list[str]) -> None:
    s += "Tips for staying healthy:\n"
    s += "".join(f"{number}. {tip}.\n" for number, tip in enumerate(tips, start=1))
    copies = s.fork(len(tips))
    copies += lambda i: f"\n{tips[i]}: this helps because"
    copies += sgl.gen("reason", max_tokens=24, stop="\n")
    copies.join()
    # After the join `s` has the copies' variables but not their text, so it is added here.
    for tip, reason in zip(tips, s["reason"], strict=True):
        s += f"\n{tip}: this helps because{reason}"
    s += "\nIn summary," + sgl.gen("summary", max_tokens=16, stop="\n")


def main(argv: list[str] | None = None) -> sgl.ProgramState:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    state = explain_tips.run(TIPS, temperature=0)
    for tip, reason in zip(TIPS, state["reason"], strict=True):
        print(f"{tip}:{reason}")
    print(f"In summary,{state['summary']}")
    return state


if __name__ == "__main__":
    main()
