/* A GPU that does nothing: one library in the place of CUDA's driver, its runtime, cuBLAS and NCCL.
 *
 * It is loaded as libcuda.so.1 by those that ask for a driver, and preloaded it takes the calls that torch makes to
 * libcudart, libcublas and libnccl. So torch, Inductor, Triton and DDP take their CUDA path without a GPU and without
 * a change. Memory is address space of the host, copies are real copies, streams and events are numbers, kernels are
 * named and counted, and nothing is computed. Signatures are those of CUDA 13 and NCCL 2.27.
 *
 * Variables of the environment:
 *   NULLGPU_LOG=FILE     one line for each event of a process, in FILE.PID
 *   NULLGPU_GIB=139      memory of a device
 *   NULLGPU_COUNT=1      number of devices, of which CUDA_VISIBLE_DEVICES shows some; none if it is empty or -1
 *   NULLGPU_NAME=...     name of the card, as its driver gives it
 *   NULLGPU_CC=90        compute capability
 *   NULLGPU_SHARED=N     bytes of shared memory that one block may have
 *   NULLGPU_FAIL_AT=N    from the N-th kernel on, every call fails as after a crashed kernel
 *   NULLGPU_PIN_MIB=N    no more page-locked memory than this
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "driver_types.h"
#include "vector_types.h"

#define GIB (1024ull * 1024 * 1024)
#define MIB (1024ull * 1024)

/* The numbers of cudaError that callers tell apart. */
enum { SUCCESS = 0, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, LAUNCH_FAILURE = 719, NOT_IN_A_CAPTURE = 900 };

/* A function that succeeds and leaves nothing behind; it takes any arguments. */
#define ACCEPT(name) \
    int name() { return SUCCESS; }

typedef unsigned long long u64;

/* ------------------------------------------------------------------------------------------------ the card's facts */

static u64 memory_total = 139 * GIB, memory_used;
static int capability = 90, shared_memory = 232448, device_count = 1;
static const char *card_name = "NVIDIA H100 80GB HBM3";
static __thread int current_device;

/* ------------------------------------------------------------------------------------------------ the log of events */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *out;

/* For tests, by ctypes: write events to `path` from now on, to nothing for NULL or "". */
void nullgpu_log(const char *path) {
    pthread_mutex_lock(&lock);
    if (out) fclose(out);
    out = path && *path ? fopen(path, "w") : NULL;
    pthread_mutex_unlock(&lock);
}

/* The stream whose calls become nodes of a graph, and their number so far. One process captures one at a time. */
static void *capturing;
static long nodes;

static void say(const char *form, ...) {
    if (capturing) nodes++;
    if (!out) return;
    va_list arguments;
    va_start(arguments, form);
    pthread_mutex_lock(&lock);
    if (out) {
        vfprintf(out, form, arguments);
        fputc('\n', out);
    }
    pthread_mutex_unlock(&lock);
    va_end(arguments);
}

/* For tests: a line of their own. A mark is flushed, so that it is there when the process is killed. */
void nullgpu_say(const char *what) { say("%s", what); }
void nullgpu_mark(const char *what) {
    say("mark %s", what);
    if (out) fflush(out);
}

/* ------------------------------------------------------------------------------------------------ failures on demand */

static long launches, fail_at = -1;
static int last_error;

/* A crashed kernel cannot be undone: every later call gives the same error. */
static int lost(void) { return fail_at >= 0 && launches >= fail_at ? LAUNCH_FAILURE : SUCCESS; }
static int failed(int error) { return last_error = error; }

#define FAIL_IF_LOST \
    if (lost()) return failed(lost());

/* A call that waits for the device, which has not begun with what is captured. */
#define FAIL_IF_CAPTURING \
    if (capturing) return failed(NOT_IN_A_CAPTURE);

/* A call that needs the device and changes nothing. */
#define ACCEPT_ALIVE(name) \
    int name() { FAIL_IF_LOST return SUCCESS; }

int cudaGetLastError(void) {
    if (lost()) return lost();
    int error = last_error;
    last_error = SUCCESS;
    return error;
}
int cudaPeekAtLastError(void) { return lost() ? lost() : last_error; }

const char *cudaGetErrorString(int error) {
    switch (error) {
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_DEVICE: return "invalid device ordinal";
    case LAUNCH_FAILURE: return "unspecified launch failure";
    case NOT_IN_A_CAPTURE: return "operation not permitted when stream is capturing";
    default: return "null GPU error";
    }
}
const char *cudaGetErrorName(int error) {
    switch (error) {
    case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
    case INVALID_DEVICE: return "cudaErrorInvalidDevice";
    case LAUNCH_FAILURE: return "cudaErrorLaunchFailure";
    case NOT_IN_A_CAPTURE: return "cudaErrorStreamCaptureUnsupported";
    default: return "cudaErrorNull";
    }
}

__attribute__((constructor)) static void begin(void) {
    char *value;
    if ((value = getenv("NULLGPU_LOG"))) {
        char path[4096];
        snprintf(path, sizeof path, "%s.%d", value, getpid());
        nullgpu_log(path);
    }
    if ((value = getenv("NULLGPU_GIB"))) memory_total = atof(value) * GIB;
    if ((value = getenv("NULLGPU_CC"))) capability = atoi(value);
    if ((value = getenv("NULLGPU_SHARED"))) shared_memory = atoi(value);
    if ((value = getenv("NULLGPU_COUNT"))) device_count = atoi(value);
    if ((value = getenv("CUDA_VISIBLE_DEVICES"))) {
        int shown = *value && strcmp(value, "-1");
        for (char *at = value; shown && (at = strchr(at, ',')); at++) shown++;
        if (shown < device_count) device_count = shown;
    }
    if ((value = getenv("NULLGPU_NAME"))) card_name = value;
    if ((value = getenv("NULLGPU_FAIL_AT"))) fail_at = atol(value);
}
__attribute__((destructor)) static void finish(void) {
    if (out) fflush(out);
}

/* ------------------------------------------------------------------------------------------------ memory */

/* The values of cudaMemoryType, so that a pointer's attributes need no translation. */
enum { ON_HOST = 0, PINNED = 1, ON_DEVICE = 2 };

struct range {
    char *at;
    size_t size;
    int kind, device;
};
static struct range *ranges;
static size_t range_count, range_room;

static void keep(void *at, size_t size, int kind) {
    pthread_mutex_lock(&lock);
    if (range_count == range_room) {
        range_room = range_room * 2 + 64;
        ranges = realloc(ranges, range_room * sizeof *ranges);
    }
    ranges[range_count++] = (struct range){at, size, kind, current_device};
    pthread_mutex_unlock(&lock);
}

static struct range drop(void *at) {
    struct range found = {0};
    pthread_mutex_lock(&lock);
    for (size_t i = range_count; i-- > 0;)
        if (ranges[i].at == at) {
            found = ranges[i];
            ranges[i] = ranges[--range_count];
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

/* The range that holds an address; one of zeros, and so of kind ON_HOST, for ordinary memory. */
static struct range find(const void *address) {
    struct range found = {0};
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < range_count; i++)
        if ((char *)address >= ranges[i].at && (char *)address < ranges[i].at + ranges[i].size) {
            found = ranges[i];
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

/* Address space without pages: 139 GiB of a device cost the host only what is written, which is next to nothing. */
int cudaMalloc(void **pointer, size_t size) {
    FAIL_IF_LOST
    if (memory_used + size > memory_total) return failed(OUT_OF_MEMORY);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return failed(OUT_OF_MEMORY);
    memory_used += size;
    keep(at, size, ON_DEVICE);
    *pointer = at;
    say("malloc %zu", size);
    return SUCCESS;
}
int cudaFree(void *pointer) {
    FAIL_IF_LOST
    struct range range = drop(pointer);
    if (range.at) {
        munmap(range.at, range.size);
        memory_used -= range.size;
    }
    return SUCCESS;
}
int cudaMallocAsync(void **pointer, size_t size, void *stream) { return cudaMalloc(pointer, size); }
int cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }
int cudaMemGetInfo(size_t *available, size_t *total) {
    FAIL_IF_LOST
    *available = memory_total - memory_used;
    *total = memory_total;
    return SUCCESS;
}

static u64 pinned_bytes;

int cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    /* Read here and not at start, so that a test may lower the limit while it runs. */
    char *limit = getenv("NULLGPU_PIN_MIB");
    if (limit && (pinned_bytes += size) > atof(limit) * MIB) {
        *pointer = NULL;
        return failed(OUT_OF_MEMORY);
    }
    FAIL_IF_LOST
    *pointer = aligned_alloc(4096, (size + 4095) & ~4095ull);
    keep(*pointer, size, PINNED);
    say("host_alloc %zu", size);
    return SUCCESS;
}
int cudaFreeHost(void *pointer) {
    FAIL_IF_LOST
    struct range range = drop(pointer);
    if (range.at) free(range.at);
    return SUCCESS;
}
int cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    FAIL_IF_LOST
    keep(pointer, size, PINNED);
    return SUCCESS;
}
int cudaHostUnregister(void *pointer) {
    drop(pointer);
    return SUCCESS;
}

/* Copies from and to the host are real: the loader's rows arrive. A large copy inside the device is left out, since it
 * would give pages to memory that has none. */
#define SMALL 65536

static const char *place(int kind) { return kind == ON_DEVICE ? "D" : kind == PINNED ? "pinned" : "H"; }

static int copy(void *to, const void *from, size_t size, const char *how) {
    int target = find(to).kind, source = find(from).kind;
    say("copy %s %s>%s %zu", how, place(source), place(target), size);
    if (target != ON_DEVICE || source != ON_DEVICE || size <= SMALL) memmove(to, from, size);
    return SUCCESS;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    FAIL_IF_LOST
    FAIL_IF_CAPTURING
    return copy(to, from, size, "sync");
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    FAIL_IF_LOST
    return copy(to, from, size, "async");
}
int cudaMemset(void *at, int value, size_t size) {
    FAIL_IF_LOST
    say("memset %zu", size);
    if (size <= SMALL) memset(at, value, size);
    return SUCCESS;
}
int cudaMemsetAsync(void *at, int value, size_t size, void *stream) { return cudaMemset(at, value, size); }

int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    FAIL_IF_LOST
    struct range range = find(pointer);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = range.kind;
    attributes->device = range.device;
    attributes->devicePointer = range.kind != ON_HOST ? (void *)pointer : NULL;
    attributes->hostPointer = range.kind == PINNED ? (void *)pointer : NULL;
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------ devices */

/* An H100's numbers, but for what the environment sets: torch and Triton choose kernels by capability and memory. */
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, card_name);
    p->major = capability / 10;
    p->minor = capability % 10;
    p->totalGlobalMem = memory_total;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = shared_memory;
    p->sharedMemPerMultiprocessor = shared_memory + 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = i == 2 ? 64 : 1024;
        p->maxGridSize[i] = i ? 65535 : 2147483647;
    }
    p->multiProcessorCount = 132;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120;
    p->unifiedAddressing = 1;
    p->cooperativeLaunch = 1;
    p->textureAlignment = 512;
    return SUCCESS;
}

/* The same by the numbers of cudaDeviceAttr. */
static int attribute(int which) {
    switch (which) {
    case 1: case 2: case 3: return 1024;      /* threads of a block, and its x and y */
    case 4: return 64;                        /* z of a block */
    case 5: return 2147483647;                /* x of a grid */
    case 6: case 7: return 65535;             /* y and z of a grid */
    case 8: return 49152;                     /* shared memory of a block without opting in */
    case 10: return 32;                       /* warp */
    case 12: case 82: return 65536;           /* registers of a block, of a multiprocessor */
    case 13: return 1980000;                  /* clock, kHz */
    case 16: return 132;                      /* multiprocessors */
    case 36: return 2619000;                  /* memory clock, kHz */
    case 37: return 5120;                     /* memory bus, bits */
    case 38: return 50 << 20;                 /* L2 */
    case 39: return 2048;                     /* threads of a multiprocessor */
    case 75: return capability / 10;
    case 76: return capability % 10;
    case 81: return shared_memory + 1024;     /* shared memory of a multiprocessor */
    case 95: return 1;                        /* cooperative launch */
    case 97: return shared_memory;            /* shared memory of a block that opts in */
    case 106: return 32;                      /* blocks of a multiprocessor */
    default: return 0;
    }
}
int cudaDeviceGetAttribute(int *value, int which, int device) {
    *value = attribute(which);
    return SUCCESS;
}

int cudaGetDeviceCount(int *count) {
    *count = device_count;
    return SUCCESS;
}
int cudaGetDevice(int *device) {
    *device = current_device;
    return SUCCESS;
}
int cudaSetDevice(int device) {
    if (device < 0 || device >= device_count) return failed(INVALID_DEVICE);
    current_device = device;
    return SUCCESS;
}
int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}
int cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:00:00.0");
    return SUCCESS;
}
int cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
    *lowest = 0;
    *highest = -5;
    return SUCCESS;
}
int cudaDeviceSynchronize(void) {
    FAIL_IF_LOST
    FAIL_IF_CAPTURING
    say("sync device");
    return SUCCESS;
}

/* torch asks for some functions of the driver by name. Those that are not here succeed. */
static int nothing() { return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, u64 flags, int *status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = nothing;
    if (status) *status = 0;
    return SUCCESS;
}
ACCEPT(cudaProfilerStart)
ACCEPT(cudaProfilerStop)

/* ------------------------------------------------------------------------------------------------ streams and events */

/* Everything has happened when a call returns, so a stream is a number and an event is in the past. */
static long next_handle = 0x1000;

static int new_handle(void **handle) {
    *handle = (void *)(next_handle += 16);
    return SUCCESS;
}
int cudaStreamCreate(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return new_handle(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    FAIL_IF_LOST
    return new_handle(stream);
}
ACCEPT(cudaStreamDestroy)
int cudaStreamGetPriority(void *stream, int *priority) {
    *priority = 0;
    return SUCCESS;
}
ACCEPT_ALIVE(cudaStreamQuery)
int cudaStreamSynchronize(void *stream) {
    FAIL_IF_LOST
    if (stream == capturing) FAIL_IF_CAPTURING
    say("sync stream");
    return SUCCESS;
}
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
    FAIL_IF_LOST
    say("wait_event");
    return SUCCESS;
}
/* A graph is the number of its nodes. What is captured is logged while it is, and a replay is one line. */
static u64 captures;

int cudaStreamIsCapturing(void *stream, int *active) {
    *active = capturing && stream == capturing;
    return SUCCESS;
}
int cudaStreamGetCaptureInfo(void *s, int *status, u64 *id, void **graph, void **dependencies, void **edges,
                             size_t *n) {
    *status = capturing && s == capturing;
    if (id) *id = *status ? captures : 0;
    if (graph) *graph = NULL;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (n) *n = 0;
    return SUCCESS;
}
int cudaStreamBeginCapture(void *stream, int mode) {
    FAIL_IF_LOST
    FAIL_IF_CAPTURING
    say("capture");
    capturing = stream;
    captures++;
    nodes = 0;
    return SUCCESS;
}
int cudaStreamEndCapture(void *stream, long **graph) {
    capturing = NULL;
    *graph = malloc(sizeof **graph);
    **graph = nodes;
    return SUCCESS;
}
int cudaGraphGetNodes(long *graph, void *found, size_t *count) {
    *count = *graph;
    return SUCCESS;
}
int cudaGraphInstantiateWithFlags(long **made, long *graph, u64 flags) {
    *made = malloc(sizeof **made);
    **made = *graph;
    return SUCCESS;
}
int cudaGraphLaunch(long *graph, void *stream) {
    FAIL_IF_LOST
    say("graph %ld", *graph);
    return SUCCESS;
}
int cudaGraphDestroy(long *graph) {
    free(graph);
    return SUCCESS;
}
int cudaGraphExecDestroy(long *graph) { return cudaGraphDestroy(graph); }
ACCEPT(cudaThreadExchangeStreamCaptureMode)

int cudaEventCreate(void **event) { return new_handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) {
    FAIL_IF_LOST
    return new_handle(event);
}
ACCEPT(cudaEventDestroy)
ACCEPT_ALIVE(cudaEventRecord)
ACCEPT_ALIVE(cudaEventRecordWithFlags)
ACCEPT_ALIVE(cudaEventQuery)
int cudaEventSynchronize(void *event) {
    FAIL_IF_LOST
    FAIL_IF_CAPTURING
    say("sync event");
    return SUCCESS;
}
/* A constant: autotuning takes its first candidate. */
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
    *milliseconds = 1.0f;
    return SUCCESS;
}
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    function(data);
    return SUCCESS;
}
int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data, unsigned flags) {
    function(stream, 0, data);
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------ kernels of torch */

/* libtorch_cuda registers each kernel under the address of its host stub, and launches it by that address. The table
 * is an open hash: some 100,000 kernels register while torch is imported. */
struct kernel {
    const void *stub;
    const char *name;
};
static struct kernel *kernels;
static size_t kernel_slots, kernel_count;

static struct kernel *kernel_slot(const void *stub) {
    size_t i = ((size_t)stub * 0x9E3779B97F4A7C15ull >> 20) & (kernel_slots - 1);
    while (kernels[i].stub && kernels[i].stub != stub) i = (i + 1) & (kernel_slots - 1);
    return kernels + i;
}
static void register_kernel(const void *stub, const char *name) {
    if (2 * kernel_count >= kernel_slots) {
        struct kernel *earlier = kernels;
        size_t slots = kernel_slots;
        kernel_slots = slots ? slots * 2 : 1 << 17;
        kernels = calloc(kernel_slots, sizeof *kernels);
        for (size_t i = 0; i < slots; i++)
            if (earlier[i].stub) *kernel_slot(earlier[i].stub) = earlier[i];
        free(earlier);
    }
    struct kernel *slot = kernel_slot(stub);
    if (!slot->stub) kernel_count++;
    *slot = (struct kernel){stub, name};
}
static const char *kernel_name(const void *stub) {
    struct kernel *slot = kernel_slots ? kernel_slot(stub) : NULL;
    return slot && slot->stub ? slot->name : "?";
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 0; }
void __cudaRegisterVar(void **h, char *v, char *a, const char *n, int e, size_t s, int c, int g) {}
void __cudaRegisterFunction(void **h, const char *stub, char *device, const char *name, int limit, void *tid, void *bid,
                            void *block, void *grid, int *warp) {
    register_kernel(stub, name);
}
int __cudaGetKernel(void **kernel, const void *stub) {
    *kernel = (void *)stub;
    return SUCCESS;
}

/* A launch with <<<...>>> pushes its shape, and the stub pops it. */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return SUCCESS;
}

static int launch(const void *stub) {
    launches++;
    say("kernel aten %s", kernel_name(stub));
    return lost();
}
int __cudaLaunchKernel(void *f, dim3 grid, dim3 block, void **a, size_t shared, void *stream) { return launch(f); }
int cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, void *stream) { return launch(f); }
int cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, void *stream) {
    return launch(f);
}
int cudaLaunchKernelExC(const cudaLaunchConfig_t *shape, const void *f, void **arguments) { return launch(f); }

int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 232448;
    return SUCCESS;
}
ACCEPT(cudaFuncSetAttribute)
ACCEPT(cudaKernelSetAttributeForDevice)
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int threads, size_t shared) {
    *blocks = 2;
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t s, unsigned fl) {
    *n = 2;
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------ cuBLAS */

static int math_mode;

static const char *type(int t) {
    switch (t) {
    case 0: return "f32";
    case 1: return "f64";
    case 2: return "f16";
    case 14: return "bf16";
    default: return "?";
    }
}

int cublasCreate_v2(void **handle) {
    *handle = malloc(64);
    return SUCCESS;
}
ACCEPT(cublasDestroy_v2)
ACCEPT(cublasSetStream_v2)
ACCEPT(cublasSetWorkspace_v2)
ACCEPT(cublasSetPointerMode_v2)
ACCEPT(cublasSetSmCountTarget)
int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return SUCCESS;
}
int cublasSetMathMode(void *handle, int mode) {
    math_mode = mode;
    return SUCCESS;
}
int cublasGetMathMode(void *handle, int *mode) {
    *mode = math_mode;
    return SUCCESS;
}

int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *A, int a_type, int lda, void *B,
                 int b_type, int ldb, void *beta, void *C, int c_type, int ldc, int compute, int algorithm) {
    say("gemm %s>%s %d %d %d", type(a_type), type(c_type), m, n, k);
    return SUCCESS;
}
int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *A, int lda, void *B, int ldb,
                   void *beta, void *C, int ldc) {
    say("gemm f32>f32 %d %d %d%s", m, n, k, math_mode & 3 ? " tf32" : "");
    return SUCCESS;
}
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *A, int a_type, int lda,
                               long long sa, void *B, int b_type, int ldb, long long sb, void *beta, void *C,
                               int c_type, int ldc, long long sc, int batch, int compute, int algorithm) {
    say("bmm %s>%s %d x %d %d %d", type(a_type), type(c_type), batch, m, n, k);
    return SUCCESS;
}
int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, void *alpha, void *A, int lda,
                              long long sa, void *B, int ldb, long long sb, void *beta, void *C, int ldc, long long sc,
                              int batch) {
    say("bmm f32>f32 %d x %d %d %d", batch, m, n, k);
    return SUCCESS;
}

int cublasLtMatmul(void *handle, ...) {
    say("gemm lt");
    return SUCCESS;
}
/* One algorithm: an opaque 64 bytes, then its workspace size, status, waves and reserved fields. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    memset(results, 0, 64 + 8 + 4 + 4 + 16);
    *found = 1;
    return SUCCESS;
}
static int new_descriptor(void **descriptor) {
    *descriptor = calloc(1, 512);
    return SUCCESS;
}
static int free_descriptor(void *descriptor) {
    free(descriptor);
    return SUCCESS;
}
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { return new_descriptor(d); }
int cublasLtMatmulDescDestroy(void *d) { return free_descriptor(d); }
int cublasLtMatmulPreferenceCreate(void **d) { return new_descriptor(d); }
int cublasLtMatmulPreferenceDestroy(void *d) { return free_descriptor(d); }
int cublasLtMatrixLayoutCreate(void **d, int t, u64 rows, u64 columns, long long ld) { return new_descriptor(d); }
int cublasLtMatrixLayoutDestroy(void *d) { return free_descriptor(d); }
ACCEPT(cublasLtMatmulDescSetAttribute)
ACCEPT(cublasLtMatmulPreferenceSetAttribute)
ACCEPT(cublasLtMatrixLayoutSetAttribute)

/* ------------------------------------------------------------------------------------------------ driver */

/* For the launchers of Triton and Inductor. A module holds nothing, and a function is its name. */
static void *const context = (void *)0x10;

ACCEPT(cuInit)
int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int which, int device) { return cudaDeviceGetAttribute(value, which, device); }
int cuDeviceGetName(char *text, int size, int device) {
    snprintf(text, size, "%s", card_name);
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **made, int device) {
    *made = context;
    return SUCCESS;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    if (active) *active = 1;
    return SUCCESS;
}
int cuCtxGetCurrent(void **current) {
    *current = context;
    return SUCCESS;
}
int cuCtxGetDevice(int *device) { return cudaGetDevice(device); }
int cuCtxGetLimit(size_t *value, int limit) {
    *value = 8 << 20;
    return SUCCESS;
}
ACCEPT(cuCtxSetCurrent)
ACCEPT(cuCtxPushCurrent)
ACCEPT(cuCtxPopCurrent)
ACCEPT(cuCtxSetLimit)
int cuGetErrorString(int error, const char **text) {
    *text = "null GPU";
    return SUCCESS;
}
int cuGetErrorName(int error, const char **text) {
    *text = "CUDA_ERROR_NULL";
    return SUCCESS;
}

static int new_module(void **module) {
    *module = malloc(16);
    return SUCCESS;
}
int cuModuleLoad(void **module, const char *path) { return new_module(module); }
int cuModuleLoadData(void **module, const void *image) { return new_module(module); }
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *o, void *v) { return new_module(module); }
ACCEPT(cuModuleUnload)
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = strdup(name);
    return SUCCESS;
}
/* No spills: Triton would take a kernel that spills for a bad candidate. */
int cuFuncGetAttribute(int *value, int which, void *function) {
    enum { MOST_THREADS = 0, REGISTERS = 4 };
    *value = which == REGISTERS ? 64 : which == MOST_THREADS ? 1024 : 0;
    return SUCCESS;
}
ACCEPT(cuFuncSetAttribute)
ACCEPT(cuFuncSetCacheConfig)

static int launch_generated(const char *name, unsigned x, unsigned y, unsigned z) {
    launches++;
    say("kernel triton %s %ux%ux%u", name, x, y, z);
    return lost();
}
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **parameters, void **extra) {
    return launch_generated(f, x, y, z);
}
int cuLaunchCooperativeKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void *stream, void **parameters) {
    return launch_generated(f, x, y, z);
}
int cuLaunchKernelEx(const unsigned *grid, void *f, void **parameters, void **extra) {
    return launch_generated(f, grid[0], grid[1], grid[2]);
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *f, int threads, size_t shared) {
    *blocks = 2;
    return SUCCESS;
}
int cuOccupancyMaxActiveClusters(int *clusters, void *f, void *shape) {
    *clusters = 1;
    return SUCCESS;
}
int cuPointerGetAttribute(void *value, int which, u64 pointer) {
    enum { MEMORY_TYPE = 2, HOST_POINTER = 4, INVALID = 1 };
    if (which != MEMORY_TYPE && which != HOST_POINTER) {
        *(u64 *)value = pointer;
        return SUCCESS;
    }
    int kind = find((void *)pointer).kind;
    *(unsigned *)value = kind == ON_DEVICE ? 2 : 1;
    return kind != ON_HOST ? SUCCESS : INVALID;
}
int cuPointerGetAttributes(unsigned count, int *which, void **values, u64 pointer) {
    for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(values[i], which[i], pointer);
    return SUCCESS;
}
ACCEPT(cuTensorMapEncodeTiled)
ACCEPT(cuTensorMapEncodeIm2col)
/* There is no linker: nvJitLink is not needed for what is tested. */
int cuLinkCreate_v2(void) { return 1; }
int cuLinkAddData_v2(void) { return 1; }
int cuLinkComplete(void) { return 1; }

/* ------------------------------------------------------------------------------------------------ NCCL */

/* Peers that send what this process sends. */
struct communicator {
    int size, rank;
};
typedef struct {
    char bytes[128];
} unique_id;

int ncclGetVersion(int *version) {
    *version = 23007;
    return SUCCESS;
}
int ncclGetUniqueId(void *id) {
    memset(id, 1, sizeof(unique_id));
    return SUCCESS;
}
const char *ncclGetErrorString(int error) { return "null NCCL"; }
const char *ncclGetLastError(void *communicator) { return "null NCCL"; }

int ncclCommInitRank(struct communicator **made, int size, unique_id id, int rank) {
    *made = malloc(sizeof **made);
    **made = (struct communicator){size, rank};
    say("nccl init %d of %d", rank, size);
    return SUCCESS;
}
int ncclCommInitRankConfig(struct communicator **made, int size, unique_id id, int rank, void *settings) {
    return ncclCommInitRank(made, size, id, rank);
}
int ncclCommInitRankScalable(struct communicator **made, int size, int rank, int count, unique_id *id, void *settings) {
    return ncclCommInitRank(made, size, *id, rank);
}
int ncclCommSplit(struct communicator *from, int color, int key, struct communicator **made, void *settings) {
    *made = malloc(sizeof **made);
    **made = *from;
    return SUCCESS;
}
int ncclCommGetAsyncError(void *communicator, int *error) {
    *error = SUCCESS;
    return SUCCESS;
}
int ncclCommCount(struct communicator *c, int *count) {
    *count = c->size;
    return SUCCESS;
}
int ncclCommUserRank(struct communicator *c, int *rank) {
    *rank = c->rank;
    return SUCCESS;
}
int ncclCommCuDevice(struct communicator *c, int *device) { return cudaGetDevice(device); }
ACCEPT(ncclCommDestroy)
ACCEPT(ncclCommAbort)
ACCEPT(ncclCommFinalize)
ACCEPT(ncclCommRegister)
ACCEPT(ncclCommDeregister)
ACCEPT(ncclGroupStart)
ACCEPT(ncclGroupEnd)

/* Bytes of an element of ncclDataType_t. */
static size_t width(int t) {
    static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return t >= 0 && t < 12 ? widths[t] : 1;
}
/* Gradients need not move, and would give pages to memory that has none. */
static void deliver(void *to, const void *from, size_t size) {
    if (to != from && size <= MIB) memmove(to, from, size);
}

int ncclAllReduce(const void *s, void *r, size_t n, int t, int op, struct communicator *c, void *stream) {
    say("nccl all_reduce %zu", n * width(t));
    deliver(r, s, n * width(t));
    return SUCCESS;
}
int ncclBroadcast(const void *s, void *r, size_t n, int t, int root, struct communicator *c, void *stream) {
    say("nccl broadcast %zu", n * width(t));
    deliver(r, s, n * width(t));
    return SUCCESS;
}
int ncclBcast(void *buffer, size_t n, int t, int root, struct communicator *c, void *stream) {
    say("nccl broadcast %zu", n * width(t));
    return SUCCESS;
}
int ncclReduce(const void *s, void *r, size_t n, int t, int op, int root, struct communicator *c, void *stream) {
    say("nccl reduce %zu", n * width(t));
    return SUCCESS;
}
int ncclAllGather(const void *s, void *r, size_t n, int t, struct communicator *c, void *stream) {
    size_t size = n * width(t);
    say("nccl all_gather %zu", size);
    for (int i = 0; i < c->size; i++) deliver((char *)r + i * size, s, size);
    return SUCCESS;
}
int ncclReduceScatter(const void *s, void *r, size_t n, int t, int op, struct communicator *c, void *stream) {
    say("nccl reduce_scatter %zu", n * width(t));
    return SUCCESS;
}
