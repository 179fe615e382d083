/* A stand-in for NVIDIA's libnvidia-ml.so, for tests.
 *
 * It has the functions that Pilotlight calls, with the layouts of nvml.h (CUDA 12). What they answer is read at each
 * call from a text file beside the library, <library>.conf, so that a test can change it while an agent runs. Each line
 * is key=value:
 *
 *   driver=550.54.15                     driver version
 *   cuda=12040                           CUDA version, 1000 * major + 10 * minor
 *   gpus=2                               number of GPUs
 *   gpu.0.<name>=<value>                 a value of GPU 0:
 *     uuid, name, bus, capability (9.0), memory, used (bytes), temperature, utilization (percent),
 *     throttle (bit mask), ecc (count), remap_pending, remap_failed (0 or 1), mig (0 or 1),
 *     link.<number> (bus id of the other end), link.<number>.down (1: the link is not active),
 *     processes, graphics (<pid>:<bytes>, separated by commas; bytes may be -),
 *     xids (all XIDs that have occurred, separated by commas), migs (number of MIG devices)
 *   gpu.0.mig.1.<name>=<value>           a value of MIG device 1 of GPU 0: uuid, name, memory, used, processes
 *   fail.<function>=<code>               the function returns this nvmlReturn_t
 *   gpu.0.fail.<function>=<code>         the same for one GPU, or (gpu.0.mig.1.fail...) one MIG device
 *
 * A value that is missing is reported as not supported. Unlike the driver's library, an event set delivers XIDs that
 * occurred before it was registered, too: tests need not wait for the registration. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    TIMEOUT = 10,
    MAX_GPUS = 16,
    MAX_MIGS = 7,
    XID_EVENT = 8,
    REMAPPED_PENDING = 144,
    REMAPPED_FAILURE = 145,
};

typedef struct {
    char busIdLegacy[16];
    unsigned int domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} PciInfo;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned int pid; unsigned long long usedGpuMemory; unsigned int gpuInstance, computeInstance; } Process;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct {
    unsigned int fieldId, scopeId;
    long long timestamp, latencyUsec;
    unsigned int valueType;
    int nvmlReturn;
    union { double d; unsigned int ui; unsigned long ul; unsigned long long ull; } value;
} FieldValue;

/* A GPU, or a MIG device of it. */
typedef struct { int gpu, mig; } Device;
typedef struct { Device *device; unsigned long long type, data; unsigned int gpuInstance, computeInstance; } EventData;
typedef struct { Device *devices[MAX_GPUS]; int delivered[MAX_GPUS]; int count; } EventSet;

static Device gpus[MAX_GPUS];
static Device migs[MAX_GPUS][MAX_MIGS];

static const char *config_path(void) {
    static char path[4096];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    Dl_info info;
    if (!path[0] && dladdr((void *)config_path, &info)) snprintf(path, sizeof path, "%s.conf", info.dli_fname);
    pthread_mutex_unlock(&lock);
    return path;
}

/* Returns 1 and the value if the file has the key. */
static int lookup(const char *key, char *value, size_t size) {
    FILE *file = fopen(config_path(), "r");
    if (!file) return 0;
    char line[4096];
    size_t length = strlen(key);
    int found = 0;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) != 0 || line[length] != '=') continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(value, size, "%s", line + length + 1);
        found = 1;
    }
    fclose(file);
    return found;
}

static int lookup_of(const Device *device, const char *name, char *value, size_t size) {
    char key[256];
    if (device->mig < 0) snprintf(key, sizeof key, "gpu.%d.%s", device->gpu, name);
    else snprintf(key, sizeof key, "gpu.%d.mig.%d.%s", device->gpu, device->mig, name);
    return lookup(key, value, size);
}

/* The error that the file demands of a function; device may be null. */
static int failure(const Device *device, const char *function) {
    char key[256], value[64];
    snprintf(key, sizeof key, "fail.%s", function);
    if (lookup(key, value, sizeof value)) return atoi(value);
    if (device && lookup_of(device, key, value, sizeof value)) return atoi(value);
    return SUCCESS;
}

#define CHECK(device) do { int code = failure(device, __func__); if (code != SUCCESS) return code; } while (0)

static int text(const Device *device, const char *name, char *out, unsigned int size) {
    char value[4096];
    if (!lookup_of(device, name, value, sizeof value)) return NOT_SUPPORTED;
    if (strlen(value) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

static int number(const Device *device, const char *name, unsigned long long *out) {
    char value[64];
    if (!lookup_of(device, name, value, sizeof value)) return NOT_SUPPORTED;
    *out = strtoull(value, NULL, 0);
    return SUCCESS;
}

static int small(const Device *device, const char *name, unsigned int *out) {
    unsigned long long value = 0;
    int code = number(device, name, &value);
    *out = (unsigned int)value;
    return code;
}

int nvmlInit_v2(void) {
    for (int gpu = 0; gpu < MAX_GPUS; gpu++) {
        gpus[gpu] = (Device){gpu, -1};
        for (int mig = 0; mig < MAX_MIGS; mig++) migs[gpu][mig] = (Device){gpu, mig};
    }
    CHECK(NULL);
    return SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

static int global(const char *key, char *out, unsigned int size) {
    return lookup(key, out, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int size) { CHECK(NULL); return global("driver", version, size); }

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    char value[64];
    CHECK(NULL);
    int code = global("cuda", value, sizeof value);
    if (code == SUCCESS) *version = atoi(value);
    return code;
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    char value[64];
    CHECK(NULL);
    *count = lookup("gpus", value, sizeof value) ? (unsigned int)atoi(value) : 0;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    unsigned int count = 0;
    int code = nvmlDeviceGetCount_v2(&count);
    if (code != SUCCESS) return code;
    if (index >= count || index >= MAX_GPUS) return INVALID_ARGUMENT;
    CHECK(&gpus[index]);
    *device = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned int size) { CHECK(device); return text(device, "uuid", uuid, size); }
int nvmlDeviceGetName(Device *device, char *name, unsigned int size) { CHECK(device); return text(device, "name", name, size); }

int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory *memory) {
    CHECK(device);
    int code = number(device, "memory", &memory->total);
    if (code != SUCCESS) return code;
    memory->used = 0;
    number(device, "used", &memory->used);
    memory->reserved = 0;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    char value[64];
    CHECK(device);
    int code = text(device, "capability", value, sizeof value);
    if (code == SUCCESS) sscanf(value, "%d.%d", major, minor);
    return code;
}

int nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *pci) { CHECK(device); return text(device, "bus", pci->busId, sizeof pci->busId); }

int nvmlDeviceGetMigMode(Device *device, unsigned int *current, unsigned int *pending) {
    CHECK(device);
    int code = small(device, "mig", current);
    *pending = *current;
    return code;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned int *count) {
    CHECK(device);
    /* The number of slots: as with the driver, some of them are empty. */
    *count = MAX_MIGS;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned int index, Device **mig) {
    unsigned int count = 0;
    CHECK(device);
    small(device, "migs", &count);
    if (index >= count || index >= MAX_MIGS) return NOT_FOUND;
    *mig = &migs[device->gpu][index];
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(Device *device, unsigned int link, unsigned int *active) {
    char name[64], value[64];
    CHECK(device);
    snprintf(name, sizeof name, "link.%u", link);
    if (!lookup_of(device, name, value, sizeof value)) return link == 0 ? NOT_SUPPORTED : INVALID_ARGUMENT;
    strcat(name, ".down");
    *active = !lookup_of(device, name, value, sizeof value);
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Device *device, unsigned int link, PciInfo *pci) {
    char name[64];
    CHECK(device);
    snprintf(name, sizeof name, "link.%u", link);
    return text(device, name, pci->busId, sizeof pci->busId);
}

int nvmlDeviceGetTemperature(Device *device, unsigned int sensor, unsigned int *celsius) { (void)sensor; CHECK(device); return small(device, "temperature", celsius); }

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *utilization) {
    CHECK(device);
    utilization->memory = 0;
    return small(device, "utilization", &utilization->gpu);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *reasons) { CHECK(device); return number(device, "throttle", reasons); }

int nvmlDeviceGetTotalEccErrors(Device *device, unsigned int type, unsigned int counter, unsigned long long *count) {
    (void)type, (void)counter;
    CHECK(device);
    return number(device, "ecc", count);
}

int nvmlDeviceGetFieldValues(Device *device, int count, FieldValue *values) {
    CHECK(device);
    for (int at = 0; at < count; at++) {
        const char *name = values[at].fieldId == REMAPPED_PENDING ? "remap_pending"
                         : values[at].fieldId == REMAPPED_FAILURE ? "remap_failed" : "no such field";
        values[at].valueType = 1; /* unsigned int */
        values[at].nvmlReturn = small(device, name, &values[at].value.ui);
    }
    return SUCCESS;
}

static int processes(const Device *device, const char *name, unsigned int *count, Process *out) {
    char value[4096], *rest = value, *one;
    unsigned int found = 0, room = *count;
    if (!lookup_of(device, name, value, sizeof value)) value[0] = 0;
    while ((one = strsep(&rest, ","))) {
        unsigned int pid;
        char bytes[32];
        if (sscanf(one, "%u:%31s", &pid, bytes) != 2) continue;
        if (found < room) {
            out[found] = (Process){pid, strtoull(bytes, NULL, 0), -1U, -1U};
            if (bytes[0] == '-') out[found].usedGpuMemory = -1ULL;
        }
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned int *count, Process *out) { CHECK(device); return processes(device, "processes", count, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned int *count, Process *out) { CHECK(device); return processes(device, "graphics", count, out); }

int nvmlDeviceGetSupportedEventTypes(Device *device, unsigned long long *types) { CHECK(device); *types = XID_EVENT; return SUCCESS; }

int nvmlEventSetCreate(EventSet **set) {
    CHECK(NULL);
    *set = calloc(1, sizeof **set);
    return SUCCESS;
}

int nvmlEventSetFree(EventSet *set) { free(set); return SUCCESS; }

int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, EventSet *set) {
    CHECK(device);
    if (types & ~(unsigned long long)XID_EVENT) return NOT_SUPPORTED;
    set->devices[set->count++] = device;
    return SUCCESS;
}

/* The XID at this position of the list; 0 if the list is shorter. */
static unsigned long long xid_at(const Device *device, int position) {
    char value[4096], *rest = value, *one;
    if (!lookup_of(device, "xids", value, sizeof value)) return 0;
    while ((one = strsep(&rest, ","))) if (*one && position-- == 0) return strtoull(one, NULL, 10);
    return 0;
}

int nvmlEventSetWait_v2(EventSet *set, EventData *data, unsigned int timeout_ms) {
    for (unsigned int waited = 0;; waited += 5) {
        for (int at = 0; at < set->count; at++) {
            CHECK(set->devices[at]);
            unsigned long long xid = xid_at(set->devices[at], set->delivered[at]);
            if (!xid) continue;
            set->delivered[at]++;
            *data = (EventData){set->devices[at], XID_EVENT, xid, -1U, -1U};
            return SUCCESS;
        }
        if (waited >= timeout_ms) return TIMEOUT;
        usleep(5000);
    }
}
