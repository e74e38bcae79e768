#ifndef PRISM_NAMED_H
#define PRISM_NAMED_H

#include "exec.h"

/* Four descriptors: spec, ring, and the two ends of the input. */
#define NAMED_FDS 4

bool is_named(void);
int listen_in(const char *directory);
int connect_named(uint64_t number);
int open_named(struct exec *exec, int fds[NAMED_FDS], bool with_input);
void act_as_user(bool user);
int become_user(void);
void watch_input(struct exec *exec);
void take_input(struct exec *exec);
void close_input(struct exec *exec);

/* relay.c */
int start_relay(const struct message *request);
void carry(uint32_t index, uint32_t events);

#endif
