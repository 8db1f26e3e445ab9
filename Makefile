# curia.c. `make` builds with a C compiler alone and says what it leaves out; `make run` and `make test` do everything,
# and install what is missing from Debian's packages.

CC ?= gcc
CFLAGS ?= -O3 -march=native
WARNINGS := -Wall -Wextra $(WERROR)
BUILD ?= build
# Arithmetic does not set errno or trap: that is what lets loops become vector code. Order of sums is untouched.
ALL_CFLAGS = -std=gnu11 $(CFLAGS) -fno-math-errno -fno-trapping-math $(WARNINGS) $(OPENMP) $(SANITIZE)
LDLIBS = -lm -lpthread

compiles = $(shell printf '%s\n' $(1) | $(CC) $(2) -x c - -o /dev/null $(3) 2>/dev/null && echo yes)
ifeq ($(call compiles,'int main(void){return 0;}',-fopenmp),yes)
OPENMP := -fopenmp
else
OPENMP := -fopenmp-simd -Wno-unknown-pragmas
endif
HASH := \#
ifeq ($(call compiles,'$(HASH)include <nifti2_io.h>' 'int main(void){return 0;}',-I/usr/include/nifti,-lnifti2 -lznz -lz -lm),yes)
NIFTI := -DCURIA_NIFTI -I/usr/include/nifti
NIFTI_LIBS := -lnifti2 -lznz -lz
endif

PROGRAMS := train_curia evaluate test_curia prep/prep
TESTS := $(BUILD)/test_formats $(BUILD)/test_data $(BUILD)/test_evaluate
HEADERS := $(wildcard *.h curia/*.h prep/*.h)
PACKAGES := libnifti2-dev zlib1g-dev

.PHONY: all found deps run test tests clean
all: found $(addprefix $(PREFIX),$(PROGRAMS))

found:
	@echo "compiler: $(CC)"
	@echo "OpenMP:   $(if $(filter -fopenmp,$(OPENMP)),yes,no: one thread; get it with libgomp (Debian: part of gcc))"
	@echo "NIfTI:    $(if $(NIFTI),yes,no: prep makes the phantom only; get it with 'make deps' (Debian: libnifti2-dev))"
	@echo "CUDA:     no: this version has the CPU backend only"

# Everything is rebuilt when the compiler or its flags change.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(CC) $(ALL_CFLAGS) $(NIFTI)' | cmp -s - $@ || echo '$(CC) $(ALL_CFLAGS) $(NIFTI)' > $@
FORCE:

$(BUILD)/backend.o: train_curia.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DCURIA_LIBRARY -c $< -o $@
$(BUILD)/backend_fp64.o: train_curia.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DCURIA_LIBRARY -DCURIA_FP64 -c $< -o $@
$(PREFIX)train_curia: train_curia.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $< -o $@ $(LDLIBS)
$(PREFIX)evaluate: evaluate.c $(BUILD)/backend.o $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $< $(BUILD)/backend.o -o $@ $(LDLIBS)
$(PREFIX)test_curia: test_curia.c $(BUILD)/backend.o $(BUILD)/backend_fp64.o $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $< $(BUILD)/backend.o $(BUILD)/backend_fp64.o -o $@ $(LDLIBS)
$(PREFIX)prep/prep: prep/prep.c $(HEADERS) $(BUILD)/flags
	@mkdir -p $(dir $@)
	$(CC) $(ALL_CFLAGS) $(NIFTI) $< -o $@ $(NIFTI_LIBS) $(LDLIBS)
$(BUILD)/test_%: dev/test/test_%.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -I. $< -o $@ $(LDLIBS)
tests: all $(TESTS)

# Says what it installs; sudo where not root.
deps:
	@missing=; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then echo "packages: nothing missing"; else \
		echo "packages: installing$$missing"; \
		sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
		$$sudo apt-get update -q && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -q -y --no-install-recommends $$missing; fi

# Phantom shards, about two minutes of training, and the trained encoder's score beside the untrained one's.
run: deps
	@$(MAKE) --no-print-directory all
	./train_curia --out runs/first-light --resume
	./evaluate --model runs/first-light --data data/phantom/eval --random-init

test: deps
	@$(MAKE) --no-print-directory WERROR=-Werror tests
	@dev/test/run.sh

clean:
	rm -rf build $(PROGRAMS)
