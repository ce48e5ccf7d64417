"""Running the command of preprocessing in this process, and reading what it wrote."""
import json
from pathlib import Path

from research.telechat.commands.preprocess import main

SCRIPT = Path(__file__).resolve().parents[2] / "research" / "telechat" / "telechat_preprocess.py"
SAMPLES = [{"input": f"<_user>question {number}<_bot>the fox<_user>and {'very ' * (number % 9)}?",
            "output": "它是一个 dog. " * (number % 13 + 1)} for number in range(60)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def run(tmp_path, vocab, records=SAMPLES, *options, name="out", length=64):
    """Run the command in this process; returns (exit code, output folder)."""
    data = write_lines(tmp_path / f"{name}.jsonl", records) if isinstance(records, list) else records
    out = tmp_path / name
    arguments = ["--input_dataset_file", data, "--output_path", out, "--vocab_file_path", vocab, "--max_length", length,
                 "--num_workers", 0, *options]
    return main([str(argument) for argument in arguments]), out


def read_records(folder):
    """All records of a data set, as lists of int."""
    from mindspore.mindrecord import FileReader

    records = []
    for path in sorted(folder.glob("*.mindrecord")):
        reader = FileReader(str(path))
        records += [dict(record) for record in reader.get_next()]
        reader.close()
    return records


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}
