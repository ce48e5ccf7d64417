"""Made-up questions of MATH, IFEval, HumanEval and MBPP in files as they are published, and canned answers."""
import gzip
import json

MATH_SUBJECTS = {"algebra": "algebra", "counting_and_prob": "counting_and_probability", "geometry": "geometry",
                 "intermediate_algebra": "intermediate_algebra", "num_theory": "number_theory",
                 "prealgebra": "prealgebra", "precalc": "precalculus"}


def write_card_sets(folder):
    """Data sets under `folder`, as published: HumanEval.jsonl.gz, mbpp.jsonl, MATH's folders, input_data.jsonl."""
    programs = [{"task_id": f"HumanEval/{number}", "prompt": f"def add_{number}(a, b):\n",
                 "entry_point": f"add_{number}", "canonical_solution": f"    return a + b + {number}\n",
                 "test": f"def check(candidate):\n    assert candidate(2, 3) == {5 + number}\n"} for number in range(2)]
    place = folder / "openai_humaneval"
    place.mkdir()
    with gzip.open(place / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in programs)
    tests = [f"assert double_{{}}({number}) == {2 * number}" for number in (1, 2, 3)]
    records = [{"task_id": number, "text": "Write a function to double a number.", "code": "",
                "test_list": [test.format(number) for test in tests], "test_setup_code": "", "challenge_test_list": []}
               for number in (1, 11, 12, 511, 601)]
    write_lines(folder / "mbpp" / "mbpp.jsonl", records)
    for split in ("train", "test"):
        for name in MATH_SUBJECTS.values():
            place = folder / "hendrycks_math" / split / name
            place.mkdir(parents=True)
            for number in range(1, 3):
                (place / f"{number}.json").write_text(json.dumps(
                    {"problem": f"What is ${number}+1$?", "level": "Level 1", "type": name,
                     "solution": f"It is $\\boxed{{{number + 1}}}$."}, indent=4), encoding="utf-8")
    write_lines(folder / "IFEval" / "input_data.jsonl", [
        {"key": 1, "prompt": "Write two sentences without any comma.", "kwargs": [{}, {"relation": "at least",
                                                                                     "num_sentences": 2}],
         "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"]},
        {"key": 2, "prompt": "Write in lower case.", "kwargs": [{}],
         "instruction_id_list": ["change_case:english_lowercase"]}])
    punkt = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"       # what it has learnt: nothing
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("", encoding="utf-8")


def write_lines(path, records):
    """Records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def canned(answer):
    """A model of the harness that gives `answer(prompt)`."""
    from lm_eval.api.model import LM

    class Canned(LM):
        tokenizer_name = "canned"

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

        def generate_until(self, requests):
            return [answer(request.args[0]) for request in requests]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return "\n".join(message["content"] for message in chat_history)

    return Canned()
