// Mistakes of thread block clusters, here of two CTAs: each kernel with one and without it.
#include <cstdint>

#include "cluster.cuh"
#include "planted.cuh"

extern __shared__ __align__(16) uint32_t dynamic[];  // 256 words

// --- what peers write and read ---

KERNEL(remote_read_after_write) {
  __shared__ uint32_t s[256];
  cluster_sync();
  s[t] = p.x[t];
  if (kBad) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  p.y[t] = load_shared(shared_of(&s[t], cluster_rank() ^ 1));
  cluster_sync();
}

KERNEL(read_after_remote_write) {
  __shared__ uint32_t s[256];
  cluster_sync();
  store_shared(shared_of(&s[t], cluster_rank() ^ 1), p.x[t]);
  if (kBad) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  p.y[t] = *(volatile uint32_t*)&s[t];
  cluster_sync();
}

KERNEL(overwritten_while_read) {
  __shared__ volatile uint32_t s[256];
  s[t] = p.x[t];
  cluster_sync();
  p.y[t] = load_shared(shared_of((void*)&s[t], cluster_rank() ^ 1));
  if (!kBad) cluster_sync();
  s[t] = 7;
  cluster_sync();
}

KERNEL(remotely_overwritten_while_read) {
  __shared__ volatile uint32_t s[256];
  s[t] = p.x[t];
  cluster_sync();
  p.y[t] = s[t ^ 1];
  if (!kBad) cluster_sync();
  store_shared(shared_of((void*)&s[t], cluster_rank() ^ 1), 7);
  cluster_sync();
}

KERNEL(both_write) {
  __shared__ volatile uint32_t s[256];
  cluster_sync();
  s[t] = p.x[t];
  if (!kBad) cluster_sync();
  store_shared(shared_of((void*)&s[t], cluster_rank() ^ 1), 7);
  cluster_sync();
}

KERNEL(remote_atomic_and_plain) {
  __shared__ volatile uint32_t s[1];
  if (t == 0) s[0] = 0;
  cluster_sync();
  add_shared(shared_of((void*)s, 0), 1);
  add_shared(shared_of((void*)s, 0), t);  // atomics need no barrier between them
  if (!kBad) cluster_sync();
  if (cluster_rank() == 0) p.y[t] = s[0];
  cluster_sync();
}

KERNEL(remote_copy_in_flight) {
  __shared__ uint32_t s[256];
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(&s[t])),
               "l"(&p.x[t])
               : "memory");
  if (!kBad) asm volatile("cp.async.wait_all;" ::: "memory");
  cluster_sync();
  p.y[t] = load_shared(shared_of(&s[t], cluster_rank() ^ 1));
  cluster_sync();
  asm volatile("cp.async.wait_all;" ::: "memory");
}

KERNEL(rewritten_by_a_peer) {
  if (cluster_rank() == 0) p.y[t] = t;
  if (!kBad) cluster_sync();
  if (cluster_rank() == 1) p.y[t] = t + 1;
}

// --- whether peers are there ---

KERNEL(not_started) {
  __shared__ uint32_t s[256];
  if (!kBad) {
    arrive_relaxed();
    wait();
  }
  store_shared(shared_of(&s[t], cluster_rank() ^ 1), p.x[t]);
  cluster_sync();
  p.y[t] = s[t];
}

KERNEL(exit_while_read) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  cluster_sync();
  p.y[t] = load_shared(shared_of(&s[t], cluster_rank() ^ 1));
  if (!kBad) cluster_sync();
}

KERNEL(exit_while_written) {
  __shared__ uint32_t s[256];
  cluster_sync();
  store_shared(shared_of(&s[t], cluster_rank() ^ 1), p.x[t]);
  if (!kBad) cluster_sync();
}

// Only one CTA's memory is read: the other may go as soon as it has said so.
KERNEL(exit_without_waiting) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  cluster_sync();
  if (cluster_rank() == 1) p.y[t] = load_shared(shared_of(&s[t], 0));
  arrive();
  if (cluster_rank() == (kBad ? 1 : 0)) wait();
}

KERNEL(exited) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  cluster_sync();
  if (kBad) {
    asm volatile("{ .reg .pred q; setp.eq.u32 q, %0, 0; @q exit; }" ::"r"(cluster_rank()));
  }
  if (cluster_rank() == 1) p.y[t] = load_shared(shared_of(&s[t], 0));
  if (!kBad) cluster_sync();
}

// --- the barrier ---

KERNEL(relaxed_orders_no_memory) {
  __shared__ uint32_t s[256];
  s[t] = p.x[t];
  if (kBad) {
    arrive_relaxed();
  } else {
    arrive();
  }
  wait();
  p.y[t] = load_shared(shared_of(&s[t], cluster_rank() ^ 1));
  cluster_sync();
}

KERNEL(written_after_arriving) {
  __shared__ uint32_t s[256];
  if (!kBad) s[t] = p.x[t];
  arrive();
  if (kBad) s[t] = p.x[t];
  wait();
  p.y[t] = load_shared(shared_of(&s[t], cluster_rank() ^ 1));
  cluster_sync();
}

KERNEL(read_before_waiting) {
  __shared__ uint32_t s[256];
  cluster_sync();
  s[t] = p.x[t];
  arrive();
  if (!kBad) wait();
  p.y[t] = load_shared(shared_of(&s[t], cluster_rank() ^ 1));
  if (kBad) wait();
  cluster_sync();
}

KERNEL(barrier_not_reached) {
  if (!kBad || cluster_rank() == 0) cluster_sync();
  p.y[t] = t;
}

KERNEL(barrier_not_reached_by_a_warp) {
  if (!kBad || cluster_rank() == 0 || t >= 32) cluster_sync();
  p.y[t] = t;
}

KERNEL(barrier_of_the_cta_instead) {
  if (!kBad || cluster_rank() == 0) {
    cluster_sync();
  } else {
    asm volatile("bar.sync 1, 512;" ::: "memory");
  }
  p.y[t] = t;
}

KERNEL(part_of_a_warp) {
  if (kBad ? t % 32 : true) cluster_sync();
  p.y[t] = t;
}

KERNEL(waiting_without_having_come) {
  if (!kBad) arrive();
  wait();
  p.y[t] = t;
}

KERNEL(coming_twice) {
  arrive();
  if (kBad) arrive();
  wait();
  p.y[t] = t;
}

// --- addresses ---

KERNEL(rank_out_of_range) {
  dynamic[t] = p.x[t];
  cluster_sync();
  p.y[t] = load_shared(shared_of(&dynamic[t], kBad ? 2 : 1));
  cluster_sync();
}

KERNEL(remote_out_of_bounds) {
  dynamic[t] = p.x[t];
  cluster_sync();
  p.y[t] = load_shared(shared_of(&dynamic[t], cluster_rank() ^ 1) + (kBad ? 4 : 0));
  cluster_sync();
}

KERNEL(remote_below_shared_memory) {
  dynamic[t] = p.x[t];
  cluster_sync();
  p.y[t] = load_shared(shared_of(&dynamic[t], cluster_rank() ^ 1) - (kBad ? 4 : 0));
  cluster_sync();
}

KERNEL(remote_misaligned) {
  dynamic[t] = p.x[t];
  cluster_sync();
  p.y[t] = load_shared(shared_of(dynamic, cluster_rank() ^ 1) + (kBad ? 2 : 0));
  cluster_sync();
}

KERNEL(remote_address_in_a_local_load) {
  uint32_t value, at = shared_of(&dynamic[t], cluster_rank() ^ 1);
  dynamic[t] = p.x[t];
  cluster_sync();
  if (kBad) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  } else {
    value = load_shared(at);
  }
  p.y[t] = value;
  cluster_sync();
}

KERNEL(no_shared_address) {
  dynamic[t] = p.x[t];
  cluster_sync();
  uint64_t at;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(at)
               : "l"(kBad ? (const void*)p.x : (const void*)&dynamic[t]), "r"(cluster_rank() ^ 1));
  p.y[t] = *(const volatile uint32_t*)at;
  cluster_sync();
}
