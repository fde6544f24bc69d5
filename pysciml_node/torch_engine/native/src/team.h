/* Threads that take the parts of jobs, one job after the other, for as long as one call lasts: none of
   them is there when a process forks later.

   Who waits looks for a moment and then sleeps, so that a machine with fewer free cores than threads is
   not held up. Parts that no thread takes are done by the caller, also where no thread could be made. */

#include <fenv.h>
#include <pthread.h>

enum { MOST_THREADS = 256 };
#define LOOKING 3e-5 /* seconds */

typedef struct {
  void (*work)(void *job, int part);
  void *job;
  int parts, threads; /* parts of a job; threads, the caller among them */
  /* Of the job: the next part that is to be taken, and how many are done. Of the threads: how many have
     been made, how many sleep, whether the caller does, and whether there is no more to do. */
  int next, done, made, asleep, waiting, closed;
  fenv_t modes; /* of rounding, which are the caller's in every thread */
  pthread_mutex_t lock;
  pthread_cond_t more, all;
  pthread_t ids[MOST_THREADS];
} Team;

#define SEEN(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define SHOW(x, value) __atomic_store_n(&(x), value, __ATOMIC_SEQ_CST)

static void psn_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void psn_take_parts(Team *t) {
  while (SEEN(t->next) < t->parts) {
    int part = __atomic_fetch_add(&t->next, 1, __ATOMIC_SEQ_CST);
    if (part >= t->parts) return;
    t->work(t->job, part);
    if (__atomic_add_fetch(&t->done, 1, __ATOMIC_SEQ_CST) == t->parts && SEEN(t->waiting)) {
      pthread_mutex_lock(&t->lock);
      pthread_cond_signal(&t->all);
      pthread_mutex_unlock(&t->lock);
    }
  }
}

static int psn_has_more(Team *t) { return SEEN(t->next) < t->parts || SEEN(t->closed); }
static int psn_has_all(Team *t) { return SEEN(t->done) == t->parts; }

/* Wait until something is so: look for a moment, and then sleep, which `sleepers` tells. */
static void psn_wait(Team *t, int (*is_so)(Team *), int *sleepers, pthread_cond_t *wake) {
  for (double until = psn_seconds() + LOOKING; psn_seconds() < until; psn_pause())
    if (is_so(t)) return;
  pthread_mutex_lock(&t->lock);
  __atomic_add_fetch(sleepers, 1, __ATOMIC_SEQ_CST);
  while (!is_so(t)) pthread_cond_wait(wake, &t->lock);
  __atomic_sub_fetch(sleepers, 1, __ATOMIC_SEQ_CST);
  pthread_mutex_unlock(&t->lock);
}

static void psn_wake_sleepers(Team *t) {
  if (!SEEN(t->asleep)) return;
  pthread_mutex_lock(&t->lock);
  pthread_cond_broadcast(&t->more);
  pthread_mutex_unlock(&t->lock);
}

static void *psn_thread(void *x) {
  Team *t = x;
  fesetenv(&t->modes);
  while (!SEEN(t->closed)) {
    psn_take_parts(t);
    psn_wait(t, psn_has_more, &t->asleep, &t->more);
  }
  return 0;
}

/* A team whose threads are made when there is a job. */
static void psn_open(Team *t, int parts, int64_t threads) {
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  t->parts = parts, t->threads = threads < parts ? (int)threads : parts;
  t->next = t->done = parts;
  t->made = t->asleep = t->waiting = t->closed = 0;
}

static void psn_make_threads(Team *t) {
  fegetenv(&t->modes);
  pthread_mutex_init(&t->lock, 0);
  pthread_cond_init(&t->more, 0);
  pthread_cond_init(&t->all, 0);
  while (t->made < t->threads - 1 && !pthread_create(&t->ids[t->made], 0, psn_thread, t)) t->made++;
  t->threads = t->made + 1;
}

/* Do all parts of a job. */
static void psn_do(Team *t, void (*work)(void *, int), void *job) {
  if (t->threads > 1 && !t->made) psn_make_threads(t);
  if (t->threads <= 1) {
    for (int part = 0; part < t->parts; part++) work(job, part);
    return;
  }
  t->work = work, t->job = job;
  SHOW(t->done, 0);
  SHOW(t->next, 0);
  psn_wake_sleepers(t);
  psn_take_parts(t);
  psn_wait(t, psn_has_all, &t->waiting, &t->all);
}

static void psn_close(Team *t) {
  if (!t->made) return;
  SHOW(t->closed, 1);
  psn_wake_sleepers(t);
  for (int i = 0; i < t->made; i++) pthread_join(t->ids[i], 0);
  pthread_mutex_destroy(&t->lock);
  pthread_cond_destroy(&t->more);
  pthread_cond_destroy(&t->all);
}
