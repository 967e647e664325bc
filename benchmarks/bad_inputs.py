#!/usr/bin/env python3
"""Run the bad inputs of tests/helpers/bad_inputs.py, each in a process of its own, and write down what each gets.

    python benchmarks/bad_inputs.py --results results/reliability/bad_inputs.md

Exit code 1 where one gets another exit code than the list says, or a traceback, or where a file's code has run.
"""
import argparse
import logging
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from common import ROOT, table

sys.path.insert(0, str(ROOT / 'tests'))
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ.setdefault('OMP_NUM_THREADS', '1')

import timm.data  # noqa: E402,F401
from helpers import bad_inputs  # noqa: E402

import train  # noqa: E402
from dks_timm import cli  # noqa: E402,F401
from dks_timm.publishing import export  # noqa: E402,F401
from dks_timm.training import loop  # noqa: E402,F401

MEANING = {
    bad_inputs.RAN: 'trained through', bad_inputs.ENDED: 'ended on the way, saying why', bad_inputs.REFUSED: 'refused'}


def run(case, root):
    """Run a case in this process; return its exit code."""
    case.make(bad_inputs.make_data(root))
    os.chdir(root)
    os.environ['HF_HOME'] = str(root / 'cache')
    argv = case.command(root)
    try:
        if argv[0] == 'dks-timm':
            return cli.main(argv[1:]) or 0
        train.main(argv)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            return 1
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_forked(case):
    """Run a case in a child of this process, which has imported everything.

    Returns:
        Its exit code, the lines that it wrote to standard error, and whether code of a file has run.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, 'DIR')
        root.mkdir()
        child = os.fork()
        if not child:
            code = 70
            try:
                os.dup2(os.open(root / 'stderr', os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                code = run(case, root)
                logging.shutdown()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        text = (root / 'stderr').read_text(errors='backslashreplace').replace(str(root), 'DIR')
        return os.waitstatus_to_exitcode(status), text.splitlines(), bool(list(root.rglob('PWNED')))


def said(code, lines):
    """Return what a run said about its input: its last line, or its warnings where it trained."""
    if code:
        return lines[-1].removeprefix('train.py: error: ') if lines else ''
    return '; '.join(line.removeprefix('WARNING: ') for line in lines if 'Bad image' in line or '16 bits' in line)


def cell(text, most=200):
    text = text if len(text) <= most else f'{text[:most // 2]} ... {text[-most // 2:]}'
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)
    return text.encode('utf-8', 'backslashreplace').decode().replace('|', r'\|').replace('<', '&lt;').replace('`', "'")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, metavar='FILE', help='file for the table')
    args = parser.parse_args()
    results = args.results and args.results.resolve()
    rows, counts, bad = [], Counter(), []
    for case in bad_inputs.CASES:
        code, lines, ran_code = run_forked(case)
        trace = any(line.startswith('Traceback') for line in lines)
        wrong = code != case.code or trace or ran_code
        if wrong:
            bad.append(case.name)
            print(case.name, code, *lines[-3:], sep='\n    ')
        counts[code] += 1
        rows.append((cell(case.name, 90), code, cell(said(code, lines))))
    summary = ', '.join(f'{count} {MEANING.get(code, "failed")} ({code})' for code, count in sorted(counts.items()))
    print(f'{len(rows)} bad inputs: {summary}; not as they should: {len(bad)}')
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text('\n'.join([
            '# Bad inputs, and what each gets', '',
            '`python benchmarks/bad_inputs.py --results results/reliability/bad_inputs.md` runs the list in',
            'tests/helpers/bad_inputs.py, each input in a process of its own.',
            f'{len(rows)} inputs: {summary}. Of no file did code run, no run ended in a traceback.'
            if not bad else f'**Not as they should: {", ".join(bad)}.**', '',
            '`DIR` is the folder of the case. Where a run trains, the last column has its warnings of the input.', '',
            *table(('input', 'exit code', 'what it says'), rows), '']))
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
