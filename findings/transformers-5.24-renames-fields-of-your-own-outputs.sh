#!/usr/bin/env bash
# transformers 5.24.0 renames a field of outputs that are not its own.
#
# A library that subclasses ModelOutput and calls a field past_key_values, as transformers' own outputs did
# until 5.23, loses what is stored there: by keyword the object cannot be built; by position it can be, but
# the value goes to an attribute "cache" that the class never declared, and the field reads None. No warning
# is shown. With 5.23.0 the same lines work.
#
# Seen with Python 3.11 and torch 2.13.0. The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 2> /dev/null
cat > "$folder/output.py" <<'EOF'
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.utils.generic import ModelOutput


@dataclass
class Output(ModelOutput):
    logits: Any = None
    past_key_values: Any = None


try:
    by_keyword = repr(Output(logits=1, past_key_values="the cache").past_key_values)
except TypeError as error:
    by_keyword = f"TypeError: {error}"
made = Output(1, "the cache")
print(transformers.__version__, "| by keyword:", by_keyword)
print(transformers.__version__, "| by position:", repr(vars(made).get("past_key_values")), "| cache:", repr(vars(made).get("cache")))
EOF
for release in 5.23.0 5.24.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$release" 2> /dev/null
    (cd "$folder" && venv/bin/python output.py 2> /dev/null) | tee -a "$folder/seen"
done
cat > "$folder/expected" <<'EOF'
5.23.0 | by keyword: 'the cache'
5.23.0 | by position: 'the cache' | cache: None
5.24.0 | by keyword: TypeError: Output.__init__() got an unexpected keyword argument 'cache'
5.24.0 | by position: None | cache: 'the cache'
EOF
diff "$folder/expected" "$folder/seen"
echo "As described."
