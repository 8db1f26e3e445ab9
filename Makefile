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
found_in = $(call compiles,'$(HASH)include <$(1)>' 'int main(void){return 0;}',$(2),$(3))
ifeq ($(call found_in,nifti2_io.h,-I/usr/include/nifti,-lnifti2 -lznz -lz -lm)$(call found_in,isa-l.h,,-lisal),yesyes)
VOLUMES := -DCURIA_VOLUMES -I/usr/include/nifti
VOLUMES_LIBS := -lnifti2 -lznz -lz -lisal
endif
ifeq ($(call found_in,png.h,,-lpng),yes)
PNG := -DCURIA_PNG
PNG_LIBS := -lpng
endif
GDCM := $(lastword $(sort $(wildcard /usr/include/gdcm-*)))
ifeq ($(shell printf '%s\n' '$(HASH)include <gdcmTrace.h>' '$(HASH)include <zlib.h>' 'int main(){return 0;}' | \
        $(CXX) -std=gnu++17 -x c++ -isystem $(GDCM) - -o /dev/null -lgdcmMSFF -lz 2>/dev/null && echo yes),yes)
DICOM := -DCURIA_DICOM
DICOM_LIBS := -lgdcmMSFF -lgdcmDSED -lgdcmCommon -lz -lstdc++
endif

# nvcc from PATH or its usual place; code for every GPU generation that this nvcc knows of the three, and PTX for later ones.
NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
CUDA_HOME := $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
ifneq ($(and $(NVCC),$(wildcard $(CUDA_HOME)/include/cublasLt.h)),)
CUDA := -DCURIA_CUDA
CUDA_ARCHS ?= $(patsubst compute_%,%,$(filter compute_80 compute_90 compute_100,$(shell $(NVCC) --list-gpu-arch)))
CUDA_GENCODE = $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=[sm_$(a),compute_$(a)])
CUDA_LIB := $(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib/x86_64-linux-gnu) $(CUDA_HOME)/lib)
CUDA_LIBS := -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) -lcublasLt -lcudart_static -ldl -lrt -lstdc++
CUDA_OBJECT := $(BUILD)/cuda.o
CUDA_OBJECTS := $(BUILD)/cuda.o $(BUILD)/cuda_fp32.o
endif
NVCC_FLAGS = -std=c++17 -O3 --threads 0 -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas $(if $(WERROR),-Werror all-warnings)
CUDA_HEADERS := $(wildcard curia/cuda/*.cuh)

PROGRAMS := train_curia evaluate test_curia prep/prep
TESTS := $(BUILD)/test_formats $(BUILD)/test_data $(BUILD)/test_evaluate $(BUILD)/test_dicom $(BUILD)/fuzz_prep
HEADERS := $(wildcard *.h curia/*.h prep/*.h dev/test/*.h)
PACKAGES := g++ libgdcm-dev libnifti2-dev libisal-dev zlib1g-dev libpng-dev

.PHONY: all found deps run test tests emu ptxas gpu-check mutate fuzz kill-prep clean
all: found $(addprefix $(PREFIX),$(PROGRAMS))

found:
	@echo "compiler: $(CC)"
	@echo "OpenMP:   $(if $(filter -fopenmp,$(OPENMP)),yes,no: one thread; get it with libgomp (Debian: part of gcc))"
	@echo "DICOM:    $(if $(DICOM),yes,no: prep refuses it; get it with 'make deps' (Debian: g++ libgdcm-dev))"
	@echo "NIfTI, NRRD, MetaImage: $(if $(VOLUMES),yes,no: prep refuses them; get them with 'make deps' (Debian: libnifti2-dev libisal-dev zlib1g-dev))"
	@echo "previews: $(if $(PNG),yes,no: prep draws none; get them with 'make deps' (Debian: libpng-dev))"
	@echo "CUDA:     $(if $(CUDA),yes: $(NVCC) for $(addprefix sm_,$(CUDA_ARCHS)),no: the CPU backend only; get nvcc and cuBLASLt with NVIDIA's CUDA toolkit from 12.0 on)"

# Everything is rebuilt when the compiler or its flags change.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(CC) $(CXX) $(ALL_CFLAGS) $(DICOM) $(VOLUMES) $(PNG) $(CUDA)' | cmp -s - $@ || \
		echo '$(CC) $(CXX) $(ALL_CFLAGS) $(DICOM) $(VOLUMES) $(PNG) $(CUDA)' > $@
$(BUILD)/cuda_flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(NVCC) $(NVCC_FLAGS) $(CUDA_GENCODE)' | cmp -s - $@ || echo '$(NVCC) $(NVCC_FLAGS) $(CUDA_GENCODE)' > $@
FORCE:

$(BUILD)/backend.o: train_curia.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DCURIA_LIBRARY -c $< -o $@
$(BUILD)/backend_fp64.o: train_curia.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DCURIA_LIBRARY -DCURIA_FP64 -c $< -o $@
$(BUILD)/cuda.o: train_curia.cu $(CUDA_HEADERS) $(HEADERS) $(BUILD)/cuda_flags
	$(NVCC) $(NVCC_FLAGS) $(CUDA_GENCODE) -c $< -o $@
$(BUILD)/cuda_fp32.o: train_curia.cu $(CUDA_HEADERS) $(HEADERS) $(BUILD)/cuda_flags
	$(NVCC) $(NVCC_FLAGS) $(CUDA_GENCODE) -DCURIA_FP32 -c $< -o $@
$(PREFIX)train_curia: train_curia.c $(CUDA_OBJECT) $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(CUDA) $< $(CUDA_OBJECT) -o $@ $(LDLIBS) $(CUDA_LIBS)
$(PREFIX)evaluate: evaluate.c $(BUILD)/backend.o $(CUDA_OBJECT) $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(CUDA) $< $(BUILD)/backend.o $(CUDA_OBJECT) -o $@ $(LDLIBS) $(CUDA_LIBS)
$(PREFIX)test_curia: test_curia.c $(BUILD)/backend.o $(BUILD)/backend_fp64.o $(CUDA_OBJECTS) $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(CUDA) $< $(BUILD)/backend.o $(BUILD)/backend_fp64.o $(CUDA_OBJECTS) -o $@ $(LDLIBS) $(CUDA_LIBS)
$(BUILD)/dicom.o: prep/dicom.cc prep/dicom.h $(BUILD)/flags
	$(CXX) -std=gnu++17 $(CFLAGS) $(WARNINGS) $(SANITIZE) $(DICOM) -I. -isystem $(GDCM) -c $< -o $@
$(PREFIX)prep/prep: prep/prep.c $(HEADERS) $(if $(DICOM),$(BUILD)/dicom.o) $(BUILD)/flags
	@mkdir -p $(dir $@)
	$(CC) $(ALL_CFLAGS) $(DICOM) $(VOLUMES) $(PNG) $< $(if $(DICOM),$(BUILD)/dicom.o) -o $@ $(DICOM_LIBS) $(VOLUMES_LIBS) $(PNG_LIBS) $(LDLIBS)
$(BUILD)/test_%: dev/test/test_%.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -I. $< -o $@ $(LDLIBS)
$(BUILD)/fuzz_prep: dev/fuzz/fuzz_prep.c $(HEADERS) $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -I. $< -o $@ $(LDLIBS)
# The CUDA backend as C++ on the CPU (dev/emu/emu.h), for ./test_curia --device emu.
EMU := $(BUILD)/emu
EMU_FLAGS = -std=c++17 -O2 -g1 -fno-strict-aliasing -fPIC $(WARNINGS) -Wno-sign-compare -Wno-unknown-pragmas $(OPENMP) $(SANITIZE) \
	-DCURIA_EMULATOR -I$(EMU) -Idev/emu -I. -Icuria/cuda
EMU_SOURCES := $(patsubst %,$(EMU)/%,train_curia.cu $(CUDA_HEADERS))
EMU_RUNTIME := $(EMU)/emu.o $(EMU)/cublas.o
EMU_TESTS := $(EMU)/test_emu $(foreach t,test_layers test_attention,$(EMU)/$(t)_bf16 $(EMU)/$(t)_fp32)
emu: $(EMU)/backend.so $(EMU)/train_curia
$(EMU)/convert: dev/emu/convert.cc $(BUILD)/flags
	@mkdir -p $(EMU)/curia/cuda $(EMU)/dev/test $(EMU)/dev/emu
	$(CXX) -std=c++17 -O1 $(WARNINGS) $< -o $@
$(EMU)/%.cu: %.cu $(EMU)/convert
	$(EMU)/convert $< > $@
$(EMU)/%.cuh: %.cuh $(EMU)/convert
	$(EMU)/convert $< > $@
$(EMU)/%.o: dev/emu/%.cc $(wildcard dev/emu/*.h) $(HEADERS) $(EMU)/convert
	$(CXX) $(EMU_FLAGS) -c $< -o $@
$(EMU)/bf16.o $(EMU)/fp32.o: $(EMU_SOURCES) $(wildcard dev/emu/*.h) $(HEADERS)
	$(CXX) $(EMU_FLAGS) $(if $(filter %fp32.o,$@),-DCURIA_FP32) -x c++ -c $(EMU)/train_curia.cu -o $@
$(EMU)/backend.so: $(EMU)/bf16.o $(EMU)/fp32.o $(EMU_RUNTIME)
	$(CXX) $(EMU_FLAGS) -shared $^ -o $@
$(EMU)/train_curia: train_curia.c $(EMU)/bf16.o $(EMU_RUNTIME) $(HEADERS)
	$(CC) $(ALL_CFLAGS) -DCURIA_CUDA $< $(EMU)/bf16.o $(EMU_RUNTIME) -o $@ $(LDLIBS) -lstdc++
$(EMU)/test_emu: $(EMU)/dev/emu/test_emu.cu $(EMU_RUNTIME)
	$(CXX) $(EMU_FLAGS) -x c++ $< -x none $(EMU_RUNTIME) -o $@
$(EMU)/%_bf16: $(EMU)/dev/test/%.cu $(EMU_SOURCES) $(EMU_RUNTIME)
	$(CXX) $(EMU_FLAGS) -x c++ $< -x none $(EMU_RUNTIME) -o $@
$(EMU)/%_fp32: $(EMU)/dev/test/%.cu $(EMU_SOURCES) $(EMU_RUNTIME)
	$(CXX) $(EMU_FLAGS) -DCURIA_FP32 -x c++ $< -x none $(EMU_RUNTIME) -o $@
tests: all emu $(EMU_TESTS) $(TESTS)

# What nvcc says of every kernel; fails where one spills.
ptxas:
	dev/ptxas.sh $(NVCC) > dev/results/ptxas.tsv

# SHARED names the folder with golden files (golden/) and scans (data/).
SHARED ?= ../shared

# On a GPU machine: build, checker, sanitizers, training, speed beside PyTorch, a table of kernels. Under ten minutes; QUICK=1: fewer.
gpu-check:
	@GOLDEN='$(or $(GOLDEN),$(SHARED)/golden)' dev/gpu_check.sh $(if $(QUICK),--quick)

# Every barrier and bound check of the CUDA backend deleted in turn: which does a test notice?
mutate: emu
	SHARED='$(SHARED)' dev/mutate.sh > dev/results/mutations.tsv; tail -1 dev/results/mutations.tsv

# prep killed at random moments, KILL_RUNS times over.
KILL_RUNS ?= 100
kill-prep: all
	dev/test/kill_prep.sh ./prep/prep $(SHARED)/data $(KILL_RUNS)

# Damaged scans into prep for FUZZ_SECONDS.
FUZZ_SECONDS ?= 3600
fuzz: $(BUILD)/fuzz_prep all
	$(BUILD)/fuzz_prep ./prep/prep $(SHARED)/data $(FUZZ_SECONDS)

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
