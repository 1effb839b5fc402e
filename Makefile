# make demo   a photograph to a 3D head through a real Triton server     make demo PHOTO=me.jpg
# make test   the tests                                                  make lint   ruff and mypy
# make demo-weights   train the shipped weights again (five hours)       make clean  what these made
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PHOTO ?= $(shell $(BIN)/python -c "import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / 'data' / 'astronaut.png')")
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint demo-weights clean .venv

demo: $(VENV)/demo
	@$(BIN)/chebface head build
	@$(BIN)/python -m export all
	@$(BIN)/chebface reconstruct "$(PHOTO)" --serve --output out

test: $(VENV)/test
	@$(BIN)/python -m pytest -q

lint: $(VENV)/test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv: $(VENV)/demo

# torch first and by its exact version, so that no other package chooses another build of it
$(VENV)/demo: pyproject.toml
	@echo "installing into $(VENV) (once, a minute or two)" >&2
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))" || \
		{ echo "error: $(PYTHON) is not 3.10 to 3.12, which the pip server needs; make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; apt install python3-venv" >&2; exit 1; }
	@$(PIP) --upgrade pip
	@$(PIP) "$(TORCH)" "numpy<2"
	@$(PIP) -e ".[demo]"
	@touch $(VENV)/demo

$(VENV)/test: $(VENV)/demo
	@$(PIP) -e ".[test]"
	@touch $(VENV)/test

demo-weights: $(VENV)/demo
	$(BIN)/chebface train encoder --config src/chebface/weights/encoder.toml -o runs/encoder
	cp runs/encoder/encoder.safetensors src/chebface/weights/
	$(BIN)/chebface data synthesize --config src/chebface/weights/data.toml --set count=120000 -o runs/data-1
	$(BIN)/chebface data synthesize --config src/chebface/weights/data.toml -o runs/data
	$(BIN)/chebface train reconstructor --config src/chebface/weights/demo-1.toml --data runs/data-1 -o runs/demo-1
	$(BIN)/chebface train reconstructor --config src/chebface/weights/demo-2.toml --data runs/data -o runs/demo-2
	$(BIN)/chebface train reconstructor --config src/chebface/weights/demo-3.toml --data runs/data -o runs/demo-3
	$(BIN)/chebface train average runs/demo-2/regressor.safetensors runs/demo-3/regressor.safetensors -o runs/demo-mean.safetensors
	$(BIN)/chebface data synthesize --config src/chebface/weights/data.toml --set first=240000 --set count=160000 -o runs/data-4
	$(BIN)/chebface train reconstructor --config src/chebface/weights/demo-4.toml --data runs/data-4 -o runs/demo-4
	$(BIN)/chebface data synthesize --config src/chebface/weights/data.toml --set seed=1 --set count=2000 -o runs/held-out
	$(BIN)/chebface train publish runs/demo-4/regressor.safetensors --held-out runs/held-out -o src/chebface/weights/demo.safetensors

clean:
	rm -rf $(VENV) out runs triton_models/*/[0-9]*
