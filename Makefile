PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Processes of the tests, one thread each, which is quicker than one process with all threads.
WORKERS := 2
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 1
# `make CONSTRAINTS=` installs the newest versions that setup.cfg allows.
CONSTRAINTS ?= constraints.txt

SHAPES := runs/shapes
EDITS := runs/edits
VIDEOS := runs/videos
STUDENTS := dmd2-1 dmd2-4 progressive-1 progressive-4

.PHONY: demo demo-text demo-edit demo-video $(STUDENTS) bench docs test test-whole suite coverage lint format typecheck wheel clean

# A run is never overwritten; the demo's own folder is the exception.
demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/diffdistill train --method dmd2 --preset digits --out runs/demo
	$(BIN)/diffdistill eval runs/demo

# A text-to-image teacher of drawn shapes, made here from nothing, and four students of it: up to 40 minutes.
demo-text: $(STAMP)
	rm -rf $(SHAPES)
	$(BIN)/diffdistill teacher --architecture stable-diffusion --data shapes --layers 1 --attention 0,1 \
		--vae-steps 1000 --vae-batch-size 16 --steps 4000 --batch-size 64 --ema 0.99 --out $(SHAPES)/teacher
	$(BIN)/diffdistill encode --teacher $(SHAPES)/teacher/teacher --data shapes:2000 --out $(SHAPES)/prompts
	$(MAKE) -j2 $(STUDENTS)
	$(BIN)/diffdistill eval $(SHAPES) --data shapes

# Two at a time, one thread each, which is quicker than one after the other with two.
DISTILL = $(BIN)/diffdistill train --teacher $(SHAPES)/teacher/teacher --prompts $(SHAPES)/prompts --threads 1 \
	--out $(SHAPES)/$@
dmd2-1:
	$(DISTILL) --method dmd2 --preset shapes
dmd2-4:
	$(DISTILL) --method dmd2 --preset shapes-4step
progressive-1:
	$(DISTILL) --method progressive --preset shapes
progressive-4:
	$(DISTILL) --method progressive --preset shapes-4step

# A teacher that changes images, made here from nothing, and a student of one step: a few minutes of one thread.
demo-edit: $(STAMP)
	rm -rf $(EDITS)
	$(BIN)/diffdistill teacher --architecture instruct-pix2pix --data edits --layers 1 --attention 0,1 --vae-steps 500 \
		--vae-batch-size 16 --steps 700 --batch-size 32 --ema 0.98 --threads 1 --out $(EDITS)/teacher
	$(BIN)/diffdistill encode --teacher $(EDITS)/teacher/teacher --data edits:1000 --threads 1 --out $(EDITS)/prompts
	$(BIN)/diffdistill train --method dmd2 --teacher $(EDITS)/teacher/teacher --prompts $(EDITS)/prompts --steps 200 \
		--batch-size 32 --threads 1 --out $(EDITS)/student
	$(BIN)/diffdistill eval $(EDITS)/student --count 200 --teacher-steps 1,4,16

# A teacher of videos that begin with an image, made here from nothing, and students of it of one and of four steps: half
# an hour of one thread.
demo-video: $(STAMP)
	rm -rf $(VIDEOS)
	$(BIN)/diffdistill teacher --architecture wan-i2v --parameterization flow --data moving:2000 --frames 5 --widths 128 \
		--layers 3 --vae-widths 16,32,32 --text-width 32 --vae-steps 800 --vae-batch-size 8 --steps 1500 \
		--batch-size 32 --optimizer muon --ema 0.99 --threads 1 --out $(VIDEOS)/teacher
	$(BIN)/diffdistill encode --teacher $(VIDEOS)/teacher/teacher --data moving:1000 --threads 1 --out $(VIDEOS)/prompts
	for steps in 1 4; do \
		$(BIN)/diffdistill train --method dmd2 --teacher $(VIDEOS)/teacher/teacher --prompts $(VIDEOS)/prompts \
			--steps 300 --batch-size 32 --guidance-scale 2 --student-steps $$steps --threads 1 \
			--out $(VIDEOS)/students/dmd2-$$steps || exit 1; \
	done
	$(BIN)/diffdistill eval $(VIDEOS)/students --teacher-steps 1,4,16 --threads 1

# What fits this machine; `diffdistill bench` makes the scoreboard. Speeds are of runs that demo and demo-text made.
bench: $(STAMP)
	$(BIN)/python -m diffdistill.eval.benchmarks.performance --out docs/performance.md

test: lint typecheck suite

suite: $(STAMP)
	$(TESTS) --durations=10

# Also every cell of the matrices of families, of which `make test` runs a few in each row: some 15 minutes more.
test-whole: $(STAMP)
	$(TESTS) --durations=10 --whole

# The site in build/site/html, without a network; a link that leads nowhere is an error.
docs: $(STAMP)
	mkdir -p build/site
	$(BIN)/python docs/build_site.py build/site --build

# The suite again, with the share of lines that it runs, file by file.
coverage: $(STAMP)
	$(TESTS) --cov=. --cov-report=term:skip-covered

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not see through the editable finder, so it reads an installed tree, made anew each time.
# build/lib goes too: setuptools would pack modules that are deleted since.
typecheck: $(STAMP)
	rm -rf build/lib build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --no-index --no-build-isolation --no-compile --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p diffdistill

wheel: $(STAMP)
	rm -rf build/lib dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Editable on purpose: after a plain install, Python run from here finds ./diffdistill without the mapped folders.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev,docs,eval,lite0]'
	touch $@
