"""What an answer says, and whether it is the right one."""

import re

from probe.problems import Problem

_NUMBER = re.compile(r"-?\d+\.?\d*")
_MARKS = ("####", "###", "The answer is:")  # GSM8K's, Coconut's and CODI's


def value(text: str) -> str:
    r"""What a text answers: its last number, commas left out, else what it says.

    As CODI and Coconut evaluate theirs; of a worked solution, what follows its mark.

    Args:
        text: An answer, as "The answer is: 1,200", or a solution that ends "#### 72".

    Returns:
        "" where nothing is said.

    Example:
        >>> value("Natalia sold 48/2 = 24 clips.\n#### 1,072"), value("The answer is: B")
        ('1072', 'B')
    """
    for mark in _MARKS:
        if mark in text:
            text = text.rsplit(mark, 1)[1]
            break
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1].rstrip(".") if numbers else text.strip()


def expected(problem: Problem) -> str:
    """What a problem's field `answer` answers; "" without one.

    Example:
        >>> expected(Problem("0", "1+1=", None, {"answer": "1+1 is 2. #### 2"}))
        '2'
    """
    answer = problem.fields.get("answer")
    return "" if answer is None else value(str(answer))


def correct(answer: str, wanted: str) -> float:
    """1.0 where two answers are the same number, or the same text; NaN where none is wanted.

    Example:
        >>> correct("5.0", "5"), correct("6", "5"), correct("b", "B")
        (1.0, 0.0, 1.0)
    """
    if not wanted:
        return float("nan")
    both = [_NUMBER.fullmatch(one) for one in (answer, wanted)]
    if all(both):
        return float(float(answer) == float(wanted))
    return float(answer.casefold() == wanted.casefold())
