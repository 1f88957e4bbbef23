"""Generate arithmetic problems with worked, correct solutions, none of them twice."""

from collections.abc import Callable, Sequence
from random import Random

NAMES = [
    "Mia",
    "Tom",
    "Ada",
    "Ben",
    "Lea",
    "Max",
    "Eva",
    "Jon",
    "Ida",
    "Sam",
    "Noa",
    "Kim",
    "Uma",
    "Leo",
    "Ivy",
    "Gus",
    "Zoe",
    "Raj",
    "Amy",
    "Oli",
]
THINGS = [
    "apples",
    "eggs",
    "books",
    "coins",
    "stamps",
    "shells",
    "pencils",
    "cards",
    "nuts",
    "plums",
    "buttons",
    "stones",
    "tickets",
    "marbles",
    "roses",
    "keys",
]


def write_sheets(seed: int, *, num_bytes: int, sheet_chars: int) -> list[str]:
    """Write sheets of different problems with their solutions, in ASCII.

    Args:
        seed: Seed of all problems.
        num_bytes: Minimum bytes of all sheets together; at most one sheet more is written.
        sheet_chars: Approximate characters of a sheet.
    """
    random = Random(f"arithmetic {seed}")
    seen: set[str] = set()
    sheets: list[str] = []
    written = 0
    while written < num_bytes:
        sheet = _write_sheet(random, seen, sheet_chars)
        sheets.append(sheet)
        written += len(sheet)
    return sheets


def _write_sheet(random: Random, seen: set[str], sheet_chars: int) -> str:
    problems: list[str] = []
    while sum(map(len, problems)) < sheet_chars:
        problem = random.choice(PROBLEMS)(random)
        if problem not in seen:
            seen.add(problem)
            problems.append(problem)
    return "\n".join(problems) + "\n"


def write_addition(first: int, second: int) -> str:
    """Write an addition digit by digit from the ones upwards, with every carry.

    Args:
        first: At least 0.
        second: At least 0.
    """
    steps: list[str] = []
    carry, left = 0, (first, second)
    while any(left):
        ones = [number % 10 for number in left]
        total = sum(ones) + carry
        carried = f" + {carry}" if carry else ""
        carry, digit = divmod(total, 10)
        new_carry = f", carry {carry}" if carry else ""
        steps.append(f"{ones[0]} + {ones[1]}{carried} = {total}, write {digit}{new_carry}")
        left = (left[0] // 10, left[1] // 10)
    if carry:
        steps.append(f"write {carry}")
    return f"Add {first} + {second}: {'; '.join(steps)}. So {first} + {second} = {first + second}."


def write_multiplication(number: int, factor: int) -> str:
    """Write a multiplication by one digit, place by place from the highest.

    Args:
        number: At least 10.
        factor: 2 to 9.
    """
    places = [int(digit) * 10**place for place, digit in enumerate(reversed(str(number)))]
    parts = [(place, place * factor) for place in reversed(places) if place]
    steps = [f"{place} x {factor} = {product}" for place, product in parts]
    sums: list[str] = []
    total = parts[0][1]
    for _, product in parts[1:]:
        sums.append(f"{total} + {product} = {total + product}")
        total += product
    return f"Multiply {number} x {factor}: {'; '.join(steps + sums)}. The product is {total}."


def _add(random: Random) -> str:
    return write_addition(random.randint(100, 9999), random.randint(100, 9999))


def _multiply(random: Random) -> str:
    return write_multiplication(random.randint(101, 999), random.randint(2, 9))


def _divide(random: Random) -> str:
    divisor, number = random.randint(3, 9), random.randint(100, 999)
    quotient, rest = divmod(number, divisor)
    return (
        f"Divide {number} by {divisor}: {divisor} x {quotient} = {divisor * quotient}, "
        f"and {number} - {divisor * quotient} = {rest}. It goes {quotient} times, remainder {rest}."
    )


def _continue_sequence(random: Random) -> str:
    start, step = random.randint(1, 400), random.randint(2, 25)
    terms = [start + step * place for place in range(8)]
    shown, following = ", ".join(map(str, terms[:5])), ", ".join(map(str, terms[5:]))
    return f"The numbers {shown} grow by {step}. The next three are {following}."


def _sort(random: Random) -> str:
    numbers = random.sample(range(10, 1000), random.randint(4, 7))
    put = ", ".join(map(str, sorted(numbers)))
    return (
        f"Put in order {', '.join(map(str, numbers))}: {put}. "
        f"The smallest is {min(numbers)}, the largest {max(numbers)}."
    )


def _buy(random: Random) -> str:
    name, thing = _pick(random, NAMES), _pick(random, THINGS)
    had, bought = random.randint(20, 99), random.randint(11, 99)
    given = random.randint(10, had)
    total = had + bought
    return (
        f"{name} has {had} {thing}, buys {bought} more and gives {given} away. "
        f"{had} + {bought} = {total}, and {total} - {given} = {total - given}. "
        f"{name} has {total - given} {thing} left."
    )


def _compare(random: Random) -> str:
    first, second = random.sample(NAMES, 2)
    thing = _pick(random, THINGS)
    few, more = random.randint(12, 60), random.randint(3, 40)
    return (
        f"{first} has {few} {thing}. {second} has {more} {thing} more than {first}. "
        f"So {second} has {few} + {more} = {few + more} {thing}, "
        f"and together they have {few} + {few + more} = {2 * few + more} {thing}."
    )


def _pack(random: Random) -> str:
    name, thing = _pick(random, NAMES), _pick(random, THINGS)
    boxes, each, over = random.randint(3, 9), random.randint(11, 48), random.randint(2, 10)
    return (
        f"{name} fills {boxes} boxes with {each} {thing} each, and {over} {thing} are left over. "
        f"{boxes} x {each} = {boxes * each}, and {boxes * each} + {over} = {boxes * each + over}, "
        f"so there were {boxes * each + over} {thing}."
    )


def _pick(random: Random, words: Sequence[str]) -> str:
    """Choose a word at random with weights 1, 1/2, 1/3, ..., as in natural text (Zipf's law)."""
    weights = [1 / place for place in range(1, len(words) + 1)]
    return random.choices(words, weights)[0]


PROBLEMS: tuple[Callable[[Random], str], ...] = (
    _add,
    _multiply,
    _divide,
    _continue_sequence,
    _sort,
    _buy,
    _compare,
    _pack,
)
"""Functions that write one problem each; all are used equally often."""
