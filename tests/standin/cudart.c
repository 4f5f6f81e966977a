/* A CUDA runtime for machines without a GPU: the functions this project calls, over malloc.

It keeps one device. Memory that is managed lives in pages which are on the host, on the device, or evicted. The bytes
stay at one address throughout, so a CPU tensor looks at them; but a page that the device had to give up for want of
room has its bytes kept aside and itself filled with poison, until a prefetch to either side restores it. So a missing
prefetch, which on a GPU costs time, shows here as wrong numbers. Fresh, freed and evicted memory each hold a pattern
that is not a number in any float type of 16 to 64 bits. Freed memory is kept, so that whoever reads it gets the
pattern. Every call is logged, and any can be made to fail. The standin_* functions are the tests' handles. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef CUDART_VERSION
#error "compile with -DCUDART_VERSION=12080 or 13000"
#endif

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_SUPPORTED = 801 };
enum { MANAGED_MEMORY = 83, CONCURRENT_MANAGED_ACCESS = 89 };
enum { UNREGISTERED, HOST, DEVICE, MANAGED };
enum { ON_HOST, ON_DEVICE, EVICTED };
enum { CPU = -1, NOWHERE = -2 };
enum { FRESH = 0x7FF5, FREED = 0xFFFD, POISON = 0xFFFE, GUARD = 0x6B6B, GUARD_BYTES = 256 };
enum { CALLS = 1 << 16, RULES = 32 };

typedef struct {
    int type, id;
} Location;

typedef struct {
    int type, device;
    void *device_pointer, *host_pointer;
#if CUDART_VERSION >= 13000
    long reserved[8];
#endif
} PointerAttributes;

typedef struct {
    int state, prefetched, preferred;
    int64_t used; /* when it was last brought to the device */
    uint8_t *kept; /* its bytes while it is evicted */
} Page;

typedef struct Allocation {
    uint8_t *block, *memory;
    int64_t size, padded, num_pages;
    int kind, live;
    Page *pages;
    struct Allocation *next;
} Allocation;

typedef struct {
    char name[32];
    uint64_t pointer, stream;
    int64_t allocation; /* its number in order of allocation, -1 if the pointer is in none */
    int64_t offset, size;
    int32_t location, detail, code;
} Call;

typedef struct {
    int64_t live, live_bytes, allocations, freed_twice, unknown_pointers, damaged_guards, written_after_free;
    int64_t evictions, lost_writes, bytes_to_device, bytes_to_host, resident_bytes, spike;
} Report;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Allocation *first, *last;
static Call calls[CALLS];
static int64_t num_calls, clock_, capacity = INT64_C(1) << 30, page_size = 2 << 20, misalignment;
static Report report;
static struct {
    char name[32];
    int64_t left;
    int code;
} rules[RULES];
static int managed_memory = 1, concurrent_access = 1;
static __thread int last_error;
static char farewell[4096];

/* Bytes */

static void fill(uint8_t *at, int64_t size, uint16_t pattern) {
    for (int64_t i = 0; i < size; i++) at[i] = i % 2 ? pattern >> 8 : pattern & 0xFF;
}

static int filled(const uint8_t *at, int64_t size, uint16_t pattern) {
    for (int64_t i = 0; i < size; i++)
        if (at[i] != (i % 2 ? pattern >> 8 : pattern & 0xFF)) return 0;
    return 1;
}

static int64_t rounded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

/* Allocations */

static Allocation *find(const void *pointer, int64_t *number) {
    *number = 0;
    for (Allocation *a = first; a; a = a->next, ++*number)
        if ((uint8_t *)pointer >= a->memory && (uint8_t *)pointer < a->memory + a->size) return a;
    *number = -1;
    return NULL;
}

static int allocate(void **pointer, size_t size, int kind) {
    if (!pointer || !size) return INVALID_VALUE;
    Allocation *a = calloc(1, sizeof *a);
    int64_t front = rounded(GUARD_BYTES, page_size < 4096 ? 4096 : page_size);
    a->size = size, a->kind = kind, a->live = 1, a->padded = rounded(size, page_size);
    a->num_pages = a->padded / page_size;
    if (posix_memalign((void **)&a->block, front, front + a->padded + misalignment + GUARD_BYTES)) {
        free(a);
        return OUT_OF_MEMORY;
    }
    a->memory = a->block + front + misalignment;
    a->pages = calloc(a->num_pages, sizeof *a->pages);
    for (int64_t i = 0; i < a->num_pages; i++) a->pages[i].prefetched = a->pages[i].preferred = NOWHERE;
    fill(a->memory - GUARD_BYTES, GUARD_BYTES, GUARD);
    fill(a->memory, a->size, FRESH);
    fill(a->memory + a->size, a->padded - a->size + GUARD_BYTES, GUARD);
    if (last) last->next = a;
    else first = a;
    last = a;
    report.allocations++, report.live++, report.live_bytes += a->size;
    *pointer = a->memory;
    return SUCCESS;
}

static int guarded(const Allocation *a) {
    return filled(a->memory - GUARD_BYTES, GUARD_BYTES, GUARD) &&
           filled(a->memory + a->size, a->padded - a->size + GUARD_BYTES, GUARD);
}

static int release(void *pointer, int kind) {
    int64_t number;
    if (!pointer) return SUCCESS;
    Allocation *a = find(pointer, &number);
    if (!a || a->memory != pointer || a->kind != kind) {
        report.unknown_pointers++;
        return INVALID_VALUE;
    }
    if (!a->live) {
        report.freed_twice++;
        return INVALID_VALUE;
    }
    for (int64_t i = 0; i < a->num_pages; i++) {
        if (a->pages[i].state == ON_DEVICE) report.resident_bytes -= page_size;
        free(a->pages[i].kept);
    }
    report.damaged_guards += !guarded(a);
    report.live--, report.live_bytes -= a->size;
    a->live = 0;
    fill(a->memory, a->size, FREED);
    return SUCCESS;
}

/* Pages */

static int64_t extent(const Allocation *a, int64_t page) { /* bytes of a page that belong to the allocation */
    int64_t left = a->size - page * page_size;
    return left < page_size ? left : page_size;
}

static int evict(void) { /* the page that was brought in longest ago */
    Allocation *of = NULL;
    int64_t oldest = 0;
    for (Allocation *a = first; a; a = a->next)
        for (int64_t i = 0; a->live && i < a->num_pages; i++)
            if (a->pages[i].state == ON_DEVICE && (!of || a->pages[i].used < of->pages[oldest].used)) of = a, oldest = i;
    if (!of) return 0;
    Page *page = of->pages + oldest;
    int64_t size = extent(of, oldest);
    page->kept = malloc(size);
    memcpy(page->kept, of->memory + oldest * page_size, size);
    fill(of->memory + oldest * page_size, size, POISON);
    page->state = EVICTED;
    report.resident_bytes -= page_size, report.evictions++, report.bytes_to_host += size;
    return 1;
}

static int make_room(int64_t bytes) {
    while (capacity - report.spike - report.resident_bytes < bytes)
        if (!evict()) return 0;
    return 1;
}

static void restore(Allocation *a, int64_t i) {
    Page *page = a->pages + i;
    uint8_t *memory = a->memory + i * page_size;
    if (page->state != EVICTED) return;
    report.lost_writes += !filled(memory, extent(a, i), POISON);
    memcpy(memory, page->kept, extent(a, i));
    free(page->kept);
    page->kept = NULL, page->state = ON_HOST;
}

static void bring(Allocation *a, int64_t i, int location) {
    Page *page = a->pages + i;
    restore(a, i);
    page->prefetched = location;
    if (location == CPU && page->state == ON_DEVICE) {
        page->state = ON_HOST, report.resident_bytes -= page_size, report.bytes_to_host += extent(a, i);
    } else if (location != CPU) {
        page->used = ++clock_;
        if (page->state == ON_HOST && make_room(page_size)) { /* without room it stays where it is, readable */
            page->state = ON_DEVICE, report.resident_bytes += page_size, report.bytes_to_device += extent(a, i);
        }
    }
}

static int pages_of(const void *pointer, size_t size, Allocation **a, int64_t *from, int64_t *to) {
    int64_t number, offset;
    *a = find(pointer, &number);
    if (!size || !*a || !(*a)->live || (*a)->kind != MANAGED) return INVALID_VALUE;
    offset = (uint8_t *)pointer - (*a)->memory;
    if (offset + (int64_t)size > (*a)->size) return INVALID_VALUE;
    *from = offset / page_size, *to = rounded(offset + size, page_size) / page_size;
    return SUCCESS;
}

/* Calls: logged, failing on demand, one at a time */

static int asked_to_fail(const char *name) {
    for (int i = 0; i < RULES; i++)
        if (rules[i].left > 0 && !strcmp(rules[i].name, name) && --rules[i].left == 0) return rules[i].code;
    return SUCCESS;
}

static Call *enter(const char *name, const void *pointer, int64_t size, int location, const void *stream, int detail) {
    pthread_mutex_lock(&mutex);
    Call *call = calls + num_calls++ % CALLS;
    memset(call, 0, sizeof *call);
    snprintf(call->name, sizeof call->name, "%s", name);
    Allocation *a = find(pointer, &call->allocation);
    call->pointer = (uint64_t)pointer, call->stream = (uint64_t)stream, call->size = size;
    call->offset = a ? (uint8_t *)pointer - a->memory : -1;
    call->location = location, call->detail = detail;
    call->code = asked_to_fail(name);
    return call;
}

static int leave(Call *call) {
    int code = call->code;
    if (code) last_error = code;
    pthread_mutex_unlock(&mutex);
    return code;
}

int cudaMallocManaged(void **pointer, size_t size, unsigned flags) {
    Call *call = enter("cudaMallocManaged", NULL, size, NOWHERE, NULL, flags);
    if (!call->code) call->code = flags == 1 ? allocate(pointer, size, MANAGED) : INVALID_VALUE;
    if (!call->code) call->offset = 0, call->pointer = (uint64_t)*pointer, call->allocation = report.allocations - 1;
    return leave(call);
}

int cudaMallocHost(void **pointer, size_t size) {
    Call *call = enter("cudaMallocHost", NULL, size, NOWHERE, NULL, 0);
    if (!call->code) call->code = allocate(pointer, size, HOST);
    if (!call->code) call->offset = 0, call->pointer = (uint64_t)*pointer, call->allocation = report.allocations - 1;
    return leave(call);
}

int cudaFree(void *pointer) {
    Call *call = enter("cudaFree", pointer, 0, NOWHERE, NULL, 0);
    if (!call->code) call->code = release(pointer, MANAGED);
    return leave(call);
}

int cudaFreeHost(void *pointer) {
    Call *call = enter("cudaFreeHost", pointer, 0, NOWHERE, NULL, 0);
    if (!call->code) call->code = release(pointer, HOST);
    return leave(call);
}

static int prefetch(const void *pointer, size_t size, int location, void *stream) {
    Call *call = enter("cudaMemPrefetchAsync", pointer, size, location, stream, 0);
    Allocation *a;
    int64_t from, to;
    if (!call->code && (location < CPU || location > 0 || !concurrent_access)) call->code = INVALID_DEVICE;
    if (!call->code) call->code = pages_of(pointer, size, &a, &from, &to);
    if (!call->code)
        for (int64_t i = from; i < to; i++) bring(a, i, location);
    return leave(call);
}

static int advise(const void *pointer, size_t size, int advice, int location) {
    Call *call = enter("cudaMemAdvise", pointer, size, location, NULL, advice);
    Allocation *a;
    int64_t from, to;
    if (!call->code && (advice < 1 || advice > 6)) call->code = INVALID_VALUE;
    if (!call->code && (location < CPU || location > 0)) call->code = INVALID_DEVICE;
    if (!call->code) call->code = pages_of(pointer, size, &a, &from, &to);
    if (!call->code && (advice == 3 || advice == 4))
        for (int64_t i = from; i < to; i++) a->pages[i].preferred = advice == 3 ? location : NOWHERE;
    return leave(call);
}

#if CUDART_VERSION >= 13000
static int place(Location location) { return location.type == 2 ? CPU : location.type == 1 ? location.id : NOWHERE; }

int cudaMemPrefetchAsync(const void *pointer, size_t size, Location location, unsigned flags, void *stream) {
    return prefetch(pointer, size, flags ? NOWHERE : place(location), stream);
}

int cudaMemAdvise(const void *pointer, size_t size, int advice, Location location) {
    return advise(pointer, size, advice, place(location));
}
#else
int cudaMemPrefetchAsync(const void *pointer, size_t size, int location, void *stream) {
    return prefetch(pointer, size, location, stream);
}

int cudaMemAdvise(const void *pointer, size_t size, int advice, int location) {
    return advise(pointer, size, advice, location);
}
#endif

int cudaMemRangeGetAttribute(void *data, size_t data_size, int attribute, const void *pointer, size_t size) {
    Call *call = enter("cudaMemRangeGetAttribute", pointer, size, NOWHERE, NULL, attribute);
    Allocation *a;
    int64_t from, to;
    if (!call->code && (data_size != 4 || (attribute != 2 && attribute != 4))) call->code = INVALID_VALUE;
    if (!call->code) call->code = pages_of(pointer, size, &a, &from, &to);
    for (int64_t i = from; !call->code && i < to; i++) {
        int here = attribute == 2 ? a->pages[i].preferred : a->pages[i].prefetched;
        if (i == from) *(int *)data = here;
        else if (here != *(int *)data) *(int *)data = NOWHERE;
    }
    return leave(call);
}

int cudaPointerGetAttributes(PointerAttributes *attributes, const void *pointer) {
    Call *call = enter("cudaPointerGetAttributes", pointer, 0, NOWHERE, NULL, 0);
    int64_t number;
    if (!call->code) {
        Allocation *a = find(pointer, &number);
        memset(attributes, 0, sizeof *attributes);
        attributes->type = a && a->live ? a->kind : UNREGISTERED;
        attributes->device = a && a->live ? 0 : NOWHERE;
        if (a && a->live) attributes->device_pointer = attributes->host_pointer = (void *)pointer;
    }
    return leave(call);
}

int cudaMemGetInfo(size_t *available, size_t *total) {
    Call *call = enter("cudaMemGetInfo", NULL, 0, NOWHERE, NULL, 0);
    if (!call->code) *available = capacity - report.spike - report.resident_bytes, *total = capacity;
    return leave(call);
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    Call *call = enter("cudaDeviceGetAttribute", NULL, 0, device, NULL, attribute);
    if (!call->code && device != 0) call->code = INVALID_DEVICE;
    if (!call->code && attribute == MANAGED_MEMORY) *value = managed_memory;
    else if (!call->code && attribute == CONCURRENT_MANAGED_ACCESS) *value = concurrent_access;
    else if (!call->code) call->code = INVALID_VALUE;
    return leave(call);
}

int cudaRuntimeGetVersion(int *version) {
    Call *call = enter("cudaRuntimeGetVersion", NULL, 0, NOWHERE, NULL, 0);
    if (!call->code) *version = CUDART_VERSION;
    return leave(call);
}

int cudaStreamSynchronize(void *stream) { return leave(enter("cudaStreamSynchronize", NULL, 0, NOWHERE, stream, 0)); }

int cudaDeviceSynchronize(void) { return leave(enter("cudaDeviceSynchronize", NULL, 0, NOWHERE, NULL, 0)); }

int cudaGetLastError(void) {
    int error = last_error;
    last_error = SUCCESS;
    return error;
}

const char *cudaGetErrorName(int code) {
    return code == INVALID_VALUE    ? "cudaErrorInvalidValue"
           : code == OUT_OF_MEMORY  ? "cudaErrorMemoryAllocation"
           : code == INVALID_DEVICE ? "cudaErrorInvalidDevice"
           : code == NOT_SUPPORTED  ? "cudaErrorNotSupported"
                                    : "unrecognized error code";
}

const char *cudaGetErrorString(int code) {
    return code == INVALID_VALUE    ? "invalid argument"
           : code == OUT_OF_MEMORY  ? "out of memory"
           : code == INVALID_DEVICE ? "invalid device ordinal"
           : code == NOT_SUPPORTED  ? "operation not supported"
                                    : "unrecognized error code";
}

/* The tests' handles */

int64_t standin_num_calls(void) { return num_calls; }

void standin_calls(Call *out, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) out[i - from] = calls[i % CALLS];
}

void standin_fail(const char *name, int64_t nth, int code) { /* nth = 1: the next call of that name */
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < RULES; i++)
        if (rules[i].left <= 0) {
            snprintf(rules[i].name, sizeof rules[i].name, "%s", name);
            rules[i].left = nth, rules[i].code = code;
            break;
        }
    pthread_mutex_unlock(&mutex);
}

int standin_last_error(void) { return last_error; }

void standin_memory(int64_t total, int64_t page) { /* before anything is allocated */
    capacity = total, page_size = page;
}

void standin_misalign(int64_t bytes) { misalignment = bytes; }

void standin_attributes(int managed, int concurrent) { managed_memory = managed, concurrent_access = concurrent; }

int standin_spike(int64_t bytes) { /* takes this much of the device, as activations do; pages give way */
    pthread_mutex_lock(&mutex);
    report.spike = 0;
    int fits = bytes <= capacity && make_room(bytes);
    if (fits) report.spike = bytes;
    pthread_mutex_unlock(&mutex);
    return fits ? SUCCESS : OUT_OF_MEMORY;
}

int standin_state(const void *pointer) { /* of the page: on the host 0, on the device 1, evicted 2 */
    int64_t number;
    Allocation *a = find(pointer, &number);
    return a ? a->pages[((uint8_t *)pointer - a->memory) / page_size].state : -1;
}

Report standin_report(void) {
    pthread_mutex_lock(&mutex);
    report.written_after_free = 0;
    int64_t damaged = report.damaged_guards;
    for (Allocation *a = first; a; a = a->next) {
        if (!a->live) report.written_after_free += !filled(a->memory, a->size, FREED);
        else report.damaged_guards += !guarded(a);
    }
    Report found = report;
    report.damaged_guards = damaged; /* those of live memory are counted for good when it is freed */
    pthread_mutex_unlock(&mutex);
    return found;
}

void standin_forgive(void) {
    report.freed_twice = report.unknown_pointers = report.damaged_guards = report.lost_writes = 0;
    for (Allocation *a = first; a; a = a->next)
        if (!a->live) fill(a->memory, a->size, FREED);
}

void standin_farewell(const char *path) { /* where to write, at the process's end, what is still allocated */
    snprintf(farewell, sizeof farewell, "%s", path);
}

__attribute__((destructor)) static void say_farewell(void) {
    FILE *file = farewell[0] ? fopen(farewell, "a") : NULL;
    if (!file) return;
    Report found = standin_report();
    fprintf(file, "%lld %lld %lld\n", (long long)found.live, (long long)found.allocations,
            (long long)(found.freed_twice + found.unknown_pointers));
    fclose(file);
}
